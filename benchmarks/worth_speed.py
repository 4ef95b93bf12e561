"""How fast the checkpoints of the worth ledger decode, in turns within one run."""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gainlens.export.timing import Contender, measure
from gainlens.model.loading import load_hf

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / ".engines/llama/bin/python"
MEMORY = 11e9
"""Bytes of caches that one comparison may hold, beside the weights and the growth of buffers."""


@dataclass(frozen=True)
class Decoding(Contender):
    """A contender whose prefill is not timed: its cache is filled with random numbers."""

    def prefills(self, context: int) -> bool:
        """Never."""
        return False


def in_python(
    folders: dict[str, Path], model: str, contexts: list[int], batches: list[int], steps: int
) -> list[dict[str, Any]]:
    """Decoding in gainlens' engine and in transformers.

    Args:
        folders: slim folders by name of the checkpoint, ``intact`` among them (an identity plan),
            and those in transformers' container as ``NAME/transformers``.
        model: name of the original.
        contexts, batches: the cells.
        steps: decoding steps whose median is taken.
    """
    import gainlens as gl

    contenders: list[tuple[str, str, Contender]] = []
    for setting in ("sdpa", "eager"):
        contenders.append(
            ("intact", f"transformers, {setting}",
             Decoding(f"intact transformers {setting}", load_hf(model), setting))
        )  # fmt: skip
    for name, folder in folders.items():
        checkpoint, _, container = name.partition("/")
        if container:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
            # Keys and values of one width run in fused attention.
            setting = "sdpa" if loaded.config.model_type == "llama" else "eager"
        else:
            loaded, setting = gl.load_slim(folder), None
        engine = f"transformers, {setting}" if container else "gainlens"
        contenders.append((checkpoint, engine, Decoding(name, loaded, setting)))
    rows = []
    with torch.inference_mode():
        for context in contexts:
            for batch in batches:
                groups, left_out = grouped(contenders, context, batch)
                timed: dict[str, dict[str, Any]] = {}
                beside: Contender | None = None
                for group in groups:
                    ours = group if beside is None else [beside, *group]
                    found = measure(ours, context, batch, steps, 0)
                    if beside is None:
                        intact = [c for name, _, c in contenders if name == "intact" and c in group]
                        beside = max(
                            intact, key=lambda c: found[c.name]["decode_tokens_per_second"]
                        )
                    base = found[beside.name]["decode_tokens_per_second"]
                    for one in group:
                        speed = found[one.name]["decode_tokens_per_second"]
                        timed[one.name] = {"tokens_per_second": speed, "intact_beside": base}
                for checkpoint, engine, one in contenders:
                    cell = {
                        "checkpoint": checkpoint,
                        "engine": engine,
                        "cache": "f32",
                        "context": context,
                        "batch": batch,
                    }
                    if one.name in left_out:
                        rows.append({**cell, "not_run": left_out[one.name]})
                    else:
                        rows.append({**cell, **timed[one.name]})
                        speed = timed[one.name]["tokens_per_second"]
                        print(checkpoint, engine, context, batch, round(speed, 1), flush=True)
    return rows


def grouped(
    contenders: list[tuple[str, str, Contender]], context: int, batch: int
) -> tuple[list[list[Contender]], dict[str, str]]:
    """Those whose caches fit into memory side by side, in as many turns as that takes.

    The intact model comes first. Each later group runs beside the intact model's best form, so a
    ratio is always of one run. transformers' eager attention joins the last group or none: it
    copies the whole cache at each step.
    """
    order = sorted(contenders, key=lambda row: ("eager" in row[1], row[0] != "intact"))
    intact = max(cache_bytes(row[2].model) for row in order if row[0] == "intact")
    groups: list[list[Contender]] = [[]]
    held, left_out = 0.0, {}
    for _, engine, one in order:
        size = cache_bytes(one.model) * context * batch
        if held + size > MEMORY:
            if "eager" in engine or intact * context * batch + size > MEMORY:
                left_out[one.name] = f"{(held + size) / 1e9:.1f} GB of caches in one run"
                continue
            groups.append([])
            held = intact * context * batch
        held += size
        groups[-1].append(one)
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
    turns: int,
    work: Path,
) -> list[dict[str, Any]]:
    """Decoding in llama.cpp, each cell in a process of its own, checkpoints in turns.

    Args:
        files: GGUF files by name of the checkpoint.
        caches: types of the cache to try, per checkpoint.
        filler: token ids of text.
        contexts, batches: the cells.
        steps: tokens that each slot decodes.
        turns: how often; the median counts.
        work: folder for jobs and answers.
    """
    rows = []
    for context in contexts:
        for batch in batches:
            found: dict[tuple[str, str], list[dict[str, Any]]] = {}
            failed: dict[tuple[str, str], str] = {}
            for _ in range(turns):
                for checkpoint, file in files.items():
                    for cache in caches[checkpoint]:
                        key = (checkpoint, cache)
                        if key in failed:
                            continue
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
                        if isinstance(answer, str):
                            failed[key] = answer
                        else:
                            found.setdefault(key, []).append(answer)
            for checkpoint in files:
                for cache in caches[checkpoint]:
                    cell: dict[str, Any] = {
                        "checkpoint": checkpoint,
                        "engine": "llama.cpp",
                        "cache": cache,
                        "context": context,
                        "batch": batch,
                    }
                    if (checkpoint, cache) in failed:
                        rows.append({**cell, "not_run": failed[checkpoint, cache]})
                        continue
                    speeds = [a["tokens_per_second"] for a in found[checkpoint, cache]]
                    cell |= {
                        "tokens_per_second": statistics.median(speeds),
                        "turns": [round(s, 2) for s in speeds],
                        "prefill_s": min(a["prefill_s"] for a in found[checkpoint, cache]),
                        "version": found[checkpoint, cache][0]["engine"],
                        "built_for": found[checkpoint, cache][0]["built_for"],
                    }
                    rows.append(cell)
                    print(checkpoint, cache, context, batch, cell["turns"], flush=True)
    return rows


def one_cell(job: dict[str, Any], work: Path) -> dict[str, Any] | str:
    """The answer of one process, or in one line why there is none."""
    question, answer, log = (work / name for name in ("job.json", "answer.json", "log.txt"))
    question.write_text(json.dumps(job))
    script = Path(__file__).with_name("worth_llama_cpp.py")
    with log.open("w") as out:
        done = subprocess.run(
            [str(LLAMA), str(script), str(question), str(answer)],
            stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines or ["no output"])[-1][:200]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found
