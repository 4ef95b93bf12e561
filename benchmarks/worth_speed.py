"""How fast the checkpoints of the worth ledger decode, in turns within one run.

Each turn is a process of its own that loads the models and fills their caches in another order.
On a virtual machine the same product of the same weights takes longer in some pages of memory than
in others, so a model that is loaded once is fast or slow by luck. Python runs with large pages of
memory (``LARGE_PAGES``): all of its rows gain, and differ less between turns.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gainlens.export.timing import Contender, measure
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / ".engines/llama/bin/python"
MEMORY = 11e9
"""Bytes of caches that one comparison may hold, beside the weights and the growth of buffers."""
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Of weights and cache in Python, by their names in the record."""
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
OURS = "gainlens"
FORMS = (
    ("transformers, sdpa", "f32"), ("transformers, sdpa", "bf16"), ("transformers, eager", "f32")
)  # fmt: skip
"""Of the intact model, beside those in gainlens' engine."""


@dataclass(frozen=True)
class Decoding(Contender):
    """A contender whose prefill is not timed: its cache is filled with random numbers."""

    def prefills(self, context: int) -> bool:
        """Never."""
        return False


def in_python(
    folders: dict[str, Path],
    model: str,
    context: int,
    batches: list[int],
    steps: int,
    work: Path,
    turn: int,
    first: list[dict[str, Any]] | None,
) -> list[dict[str, Any]]:
    """One turn of decoding in gainlens' engine and in transformers; ``merged`` takes it.

    The first turn has every form. Later ones repeat gainlens' engine, beside the forms of the
    intact model that were the best of a cell. transformers' eager attention runs in float32 alone.

    Args:
        folders: slim folders by name of the checkpoint, ``intact`` among them (an identity plan),
            and those in transformers' container as ``NAME/transformers``.
        model: name of the original.
        context, batches: the cells.
        steps: decoding steps, whose median is taken.
        work: folder for jobs and answers.
        turn: its number, which orders what runs.
        first: rows of the first turn; None if this is the first.
    """
    paths = {name: str(folder) for name, folder in folders.items()}
    forms = FORMS
    if first is not None:
        paths = {name: path for name, path in paths.items() if "/" not in name}
        best = {tuple(row["beside"]) for row in first if "beside" in row}
        forms = tuple(form for form in FORMS if form in best)
    job = {"folders": paths, "model": model, "context": context, "batches": batches}
    job |= {"steps": steps, "turn": turn, "forms": forms}
    found = answered([sys.executable, __file__], job, work, LARGE_PAGES)
    if isinstance(found, str):
        raise RuntimeError(f"decoding at {context} tokens: {found}")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def in_turns(
    work: Path,
    name: str,
    states: str,
    turns: int,
    run: Callable[[int, list[dict[str, Any]] | None], list[dict[str, Any]]] | None,
) -> list[dict[str, Any]]:
    """Rows merged over turns. A turn that is done is kept, so more can be asked for later.

    Args:
        work: folder of what is kept.
        name, states: of the cells and of the folders that are timed.
        turns: how many.
        run: gives the rows of a turn by its number and the rows of the first one; None takes only
            the turns that are kept.
    """
    per_turn: list[list[dict[str, Any]]] = []
    for turn in range(turns):
        kept = work / f"{name}_turn{turn}_{states}.json"
        if not kept.exists():
            if run is None:
                break
            write_json(kept, {"rows": run(turn, per_turn[0] if per_turn else None)})
        per_turn.append(read_json(kept)["rows"])
    return merged(per_turn) if per_turn else []


def merged(per_turn: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the first turn, with the medians over all turns that have them.

    A row brings its speed and that of the intact model in its turn, or why it was not run.
    """
    rows = []
    for first in per_turn[0]:
        cell = {k: first[k] for k in ("checkpoint", "engine", "cache", "context", "batch")}
        same = [row for turn in per_turn for row in turn if cell.items() <= row.items()]
        same = [row for row in same if "tokens_per_second" in row]
        if not same:
            rows.append({**cell, "not_run": first["not_run"]})
            continue
        speeds = [row["tokens_per_second"] for row in same]
        ratios = [
            row["tokens_per_second"] / row["intact_beside"]
            for row in same
            if "intact_beside" in row
        ]
        row = {
            **{k: v for k, v in first.items() if k in ("version", "built_for")},
            **cell,
            "tokens_per_second": statistics.median(speeds),
            "turns": [round(speed, 2) for speed in speeds],
        }
        if ratios:
            row |= {
                "ratio": statistics.median(ratios),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        rows.append(row)
    return rows


def one_turn(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell of a job, in this process."""
    import gainlens as gl

    context, steps = job["context"], job["steps"]
    dice = random.Random(job["turn"])
    makers: list[tuple[str, str, Callable[[], Contender]]] = []

    def add(checkpoint: str, engine: str, cache: str, load: Callable[..., Any]) -> None:
        name = f"{checkpoint}, {engine}, {cache}"
        setting = None if engine == OURS else engine.rpartition(" ")[2]
        dtype = PRECISIONS[cache]
        makers.append((checkpoint, engine, lambda: Decoding(name, load(dtype), setting)))

    for engine, cache in job["forms"]:
        add("intact", engine, cache, lambda dtype: load_hf(job["model"]).to(dtype))
    for name, folder in job["folders"].items():
        checkpoint, _, container = name.partition("/")
        for cache in PRECISIONS:
            if not container:
                add(checkpoint, OURS, cache, lambda dtype, f=folder: gl.load_slim(f, dtype=dtype))
                continue
            # Keys and values of one width run in fused attention.
            fused = transformers.AutoConfig.from_pretrained(folder).model_type == "llama"
            engine = f"transformers, {'sdpa' if fused else 'eager'}"
            load = transformers.AutoModelForCausalLM.from_pretrained
            if fused or cache == "f32":
                add(checkpoint, engine, cache, lambda dtype, f=folder, of=load: of(f, dtype=dtype))
    dice.shuffle(makers)
    contenders = [(checkpoint, engine, make()) for checkpoint, engine, make in makers]
    rows = []
    with torch.inference_mode():
        for batch in job["batches"]:
            groups, left_out = grouped(contenders, context, batch)
            timed: dict[str, dict[str, Any]] = {}
            beside: Contender | None = None
            form = ("", "")
            for group in groups:
                ours = [one for _, _, one in group]
                if beside is not None:
                    ours.append(beside)
                dice.shuffle(ours)
                found = measure(ours, context, batch, steps, 0)
                speeds = {n: row["decode_tokens_per_second"] for n, row in found.items()}
                if beside is None:
                    intact = [(e, c) for name, e, c in group if name == "intact"]
                    engine, beside = max(intact, key=lambda pair: speeds[pair[1].name])
                    form = (engine, precision_of(beside))
                for _, _, one in group:
                    timed[one.name] = {
                        "tokens_per_second": speeds[one.name],
                        "intact_beside": speeds[beside.name],
                        "beside": form,
                    }
            for checkpoint, engine, one in contenders:
                cell = {"checkpoint": checkpoint, "engine": engine, "cache": precision_of(one)}
                cell |= {"context": context, "batch": batch}
                if one.name in left_out:
                    rows.append({**cell, "not_run": left_out[one.name]})
                else:
                    rows.append({**cell, **timed[one.name]})
                    speed = timed[one.name]["tokens_per_second"]
                    print(one.name, context, batch, round(speed, 1), flush=True)
    return rows


def precision_of(contender: Contender) -> str:
    """The name in the record."""
    return {dtype: name for name, dtype in PRECISIONS.items()}[contender.model.dtype]


def grouped(
    contenders: list[tuple[str, str, Contender]], context: int, batch: int
) -> tuple[list[list[tuple[str, str, Contender]]], dict[str, str]]:
    """Those whose caches fit into memory side by side, in as many turns as that takes.

    The intact model comes first. Each later group runs beside the intact model's best form, so a
    ratio is always of one run. transformers' eager attention joins the last group or none: it
    copies the whole cache at each step. Nothing runs where the intact model doesn't fit.
    """
    order = sorted(contenders, key=lambda row: ("eager" in row[1], row[0] != "intact"))
    intact = max(cache_bytes(row[2].model) for row in order if row[0] == "intact")
    if (whole := intact * context * batch) > MEMORY:
        why = f"{whole / 1e9:.1f} GB of caches of the intact model"
        return [], {one.name: why for _, _, one in order}
    groups: list[list[tuple[str, str, Contender]]] = [[]]
    held, left_out = 0.0, {}
    for row in order:
        _, engine, one = row
        size = cache_bytes(one.model) * context * batch
        if held + size > MEMORY:
            if "eager" in engine or whole + size > MEMORY:
                left_out[one.name] = f"{(held + size) / 1e9:.1f} GB of caches in one run"
                continue
            groups.append([])
            held = whole
        held += size
        groups[-1].append(row)
    return groups, left_out


def cache_bytes(model: Any) -> int:
    """Bytes per token of a model's key-value cache, found by running one token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    return sum(t.numel() * t.element_size() for la in cache.layers for t in (la.keys, la.values))


def in_llama_cpp(
    files: dict[str, Path],
    caches: dict[str, list[str]],
    filler: list[int],
    contexts: list[int],
    batches: list[int],
    steps: int,
    work: Path,
) -> list[dict[str, Any]]:
    """One turn of decoding in llama.cpp, each cell in a process of its own; ``merged`` takes it.

    Args:
        files: GGUF files by name of the checkpoint.
        caches: types of the cache to try, per checkpoint.
        filler: token ids of text.
        contexts, batches: the cells.
        steps: tokens that each slot decodes.
        work: folder for jobs and answers.
    """
    rows = []
    for context in contexts:
        for batch in batches:
            beside: dict[str, float] = {}
            for checkpoint, file in files.items():
                for cache in caches[checkpoint]:
                    job = {
                        "model": str(file),
                        "context": context,
                        "batch": batch,
                        "new": steps,
                        "filler": filler[:context],
                        "cache": cache,
                        "threads": torch.get_num_threads(),
                    }
                    answer = one_cell(job, work)
                    row: dict[str, Any] = {
                        "checkpoint": checkpoint,
                        "engine": "llama.cpp",
                        "cache": cache,
                        "context": context,
                        "batch": batch,
                    }
                    if isinstance(answer, str):
                        rows.append({**row, "not_run": answer})
                        continue
                    speed = answer["tokens_per_second"]
                    if (checkpoint, cache) == ("intact", "f16"):  # llama.cpp's default cache
                        beside = {"intact_beside": speed}
                    row |= {"tokens_per_second": speed, "version": answer["engine"], **beside}
                    rows.append({**row, "built_for": answer["built_for"]})
                    print(checkpoint, cache, context, batch, round(speed, 1), flush=True)
    return rows


def one_cell(job: dict[str, Any], work: Path) -> dict[str, Any] | str:
    """The answer of one process of llama.cpp, or in one line why there is none."""
    script = Path(__file__).with_name("worth_llama_cpp.py")
    return answered([str(LLAMA), str(script)], job, work)


def answered(
    command: list[str], job: dict[str, Any], work: Path, settings: dict[str, str] | None = None
) -> dict[str, Any] | str:
    """What a command answers to a job, or the last line that it printed.

    ``settings`` go into its environment.
    """
    question, answer, log = (work / name for name in ("job.json", "answer.json", "log.txt"))
    question.write_text(json.dumps(job))
    with log.open("w") as out:
        done = subprocess.run(
            [*command, str(question), str(answer)],
            stdout=out, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, **(settings or {})},
        )  # fmt: skip
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines or ["no output"])[-1][:200]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({"rows": one_turn(asked)}))
