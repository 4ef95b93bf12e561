"""Parity of one slim checkpoint in transformers, vLLM and llama.cpp, and what it saves there.

``make engines`` makes the two engines' environments and runs this. 32 prompts of held-out text go
through the same slim model in all three; log-probabilities and 32 greedy tokens are compared.
Exit status 1 when they differ by more than the targets. Writes ``docs/results/engines.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import gainlens as gl
from gainlens.ablation import KeyMask
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.export import SlicePlan, export_model, slim
from gainlens.export.modeling import plan_of
from gainlens.export.speed_ledger import predict_decode
from gainlens.files import write_json
from gainlens.model.loading import load_hf, load_tokenizer
from gainlens.model.zoo import smollm2
from gainlens.model.zoo.cache import cache_root

ROOT = Path(__file__).resolve().parent.parent
LOGPROB_TARGET = 1e-3
HEALED = ("universal-50", "universal-50-wide", "universal-75")
"""Checkpoints of ``slots.py --save`` with thin keys and untouched values, in one set of slots."""
ENVIRONMENTS = {"vllm": ROOT / ".engines/vllm", "llama.cpp": ROOT / ".engines/llama"}
SCRIPTS = {"vllm": "engines_vllm.py", "llama.cpp": "engines_llama_cpp.py"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/engines.json")
    parser.add_argument("--turns", type=int, default=3, help="full and slim, so often in turn")
    parser.add_argument(
        "--reuse", action="store_true", help="take the checkpoints that an earlier run left"
    )
    parser.add_argument(
        "--healed", type=Path, default=cache_root() / "slots", help="folder of healed slim folders"
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".engines/work")
    return parser.parse_args()


def main() -> int:
    """Measure and write the result."""
    args = arguments()
    bridge = gl.load_model(args.model)
    calibration = gl.load_tokens(args.text, bridge, n_docs=16, length=256, split="calibration")
    prompts = gl.load_tokens(
        args.text, bridge, n_docs=args.prompts, length=args.length, split="validation"
    )
    longest = max([*args.contexts, args.length])
    filler = calibration.flatten().repeat(longest // calibration.numel() + 1)[:longest]
    gains = gl.probe_gains(bridge, calibration, progress=False)
    plan = SlicePlan.from_cut(
        KeyMask.quietest(gains, 1 - args.keep, scope="universal"), values=args.keep
    )
    thin = slim(bridge, plan, calibration)
    whole = slim(load_hf(args.model), SlicePlan.identity(bridge))
    folders = checkpoints(args, thin, whole)

    job = {
        "prompts": prompts.tolist(),
        "n_new": args.new,
        "contexts": args.contexts,
        "filler": filler.tolist(),
        "timed_tokens": 32,
        "max_length": max(longest + 64, args.length + args.new + 8),
        "threads": torch.get_num_threads(),
    }
    stock = transformers.AutoModelForCausalLM.from_pretrained(folders["vllm", "slim"])
    expected = transformers_rows(stock, prompts, args.new)
    results: dict[str, Any] = {}
    failed = []
    for engine in ENVIRONMENTS:
        runs: dict[str, list[dict[str, Any]]] = {"full": [], "slim": []}
        for turn in range(args.turns):
            for kind, done in runs.items():
                compared = kind == "slim" and turn == 0
                asked = job if compared else {**job, "prompts": job["prompts"][:1]}
                done.append(run(engine, folders[engine, kind], asked))
        found = compare(expected, runs["slim"][0]["rows"])
        found["version"] = runs["slim"][0]["engine"]
        found["decode"] = ratios(runs, whole, thin)
        results[engine] = found
        if differs(found):
            failed.append(engine)
    containers = full_values(args, plan, prompts, job)
    for (name, cache), found in containers.items():
        # A cache in f16 rounds: it is read beside the intact model's, and fails nothing.
        if cache == "f32" and differs(found):
            failed.append(f"{name} in llama.cpp")
    write_json(
        args.out,
        {
            "what": "parity of one slim checkpoint in three engines, float32",
            "model": args.model,
            "plan": {"keys": args.keep, "values": args.keep, "scope": "universal"},
            "text": {"name": args.text, "split": "validation", "prompts": len(prompts),
                     "length": args.length, "fingerprint": text_fingerprint(prompts)},
            "new_tokens": args.new,
            "targets": {"logprob": LOGPROB_TARGET, "greedy": "the same tokens"},
            "reference": f"transformers {transformers.__version__}",
            "engines": results,
            "full_values": [
                {"checkpoint": name, "cache": cache, **found}
                for (name, cache), found in containers.items()
            ],
            "seed": 0,
            **environment(),
        },
    )  # fmt: skip
    print(json.dumps(results, indent=1))
    if failed:
        print("differs from transformers: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def full_values(
    args: argparse.Namespace, plan: SlicePlan, prompts: torch.Tensor, job: dict[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Thin keys with untouched values: llama.cpp against transformers, beside the intact model.

    Healed folders where there are some, the plan's keys otherwise; by name and type of the cache.
    """
    models = {"intact": lambda: slim(load_hf(args.model), SlicePlan.identity(load_hf(args.model)))}
    for name in HEALED:
        if (folder := args.healed / f"slim_{name}").is_dir():
            models[name] = partial(gl.load_slim, folder)
    if len(models) == 1:
        models["not healed"] = lambda: slim(load_hf(args.model), plan.with_values(None))
    found = {}
    for name, load in models.items():
        thin, written = load(), {}
        for engine in ("transformers", "llama.cpp"):
            written[engine] = fresh(args, thin, engine, name)
        stock = transformers.AutoModelForCausalLM.from_pretrained(written["transformers"])
        expected = transformers_rows(stock, prompts, args.new)
        own = plan_of(thin.config)
        keys, values = own.cache_bytes_per_token(own.shape[2])
        whole = 2 * own.shape[0] * own.shape[1] * own.shape[2] * 4
        for cache in ("f32", "f16"):
            asked = {**job, "contexts": [], "rounded": cache == "f16"}
            answer = run("llama.cpp", written["llama.cpp"], asked)
            found[name, cache] = {
                **compare(expected, answer["rows"]),
                "version": answer["engine"],
                "container": type(stock).__name__,
                "cache_share": (keys + values) / whole,
            }
            print(name, cache, found[name, cache], flush=True)
    return found


def checkpoints(args: argparse.Namespace, thin: Any, whole: Any) -> dict[tuple[str, str], Path]:
    """Write the slim and the full model for both engines."""
    folders = {}
    for engine in ENVIRONMENTS:
        for kind, model in (("slim", thin), ("full", whole)):
            folder = folders[engine, kind] = args.work / f"{engine}-{kind}"
            if not (args.reuse and folder.is_dir()):
                fresh(args, model, engine, kind)
    return folders


def fresh(args: argparse.Namespace, model: Any, engine: str, name: str) -> Path:
    """Write a model for an engine, in place of what an earlier run left."""
    folder: Path = args.work / f"{engine}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer: Any = load_tokenizer(args.model)
    if engine == "llama.cpp":
        tokenizer = smollm2.packaged_gguf() if args.model == "smollm2" else None
    export_model(model, folder, engine, tokenizer=tokenizer)
    return folder


def transformers_rows(model: Any, prompts: torch.Tensor, new: int) -> list[dict[str, Any]]:
    """What stock transformers says; prompts are of one length, so none is padded."""
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    with torch.inference_mode():
        whole = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), eos_token_id=None, pad_token_id=0,
            **settings,
        )  # fmt: skip
    rows = []
    for out in whole:
        with torch.inference_mode():
            logprobs = model(out[None]).logits[0].double().log_softmax(-1)
        chosen = logprobs[:-1].gather(1, out[1:, None])[:, 0]
        length = len(out) - new
        top = logprobs[length - 1 : -1].topk(2).values
        rows.append(
            {
                "prompt_logprobs": chosen[: length - 1].tolist(),
                "greedy": out[length:].tolist(),
                "greedy_logprobs": chosen[length - 1 :].tolist(),
                "margins": (top[:, 0] - top[:, 1]).tolist(),
            }
        )
    return rows


def run(engine: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in an engine's own environment."""
    model = folder / "model.gguf" if engine == "llama.cpp" else folder
    question, answer = folder / "job.json", folder / "answer.json"
    question.write_text(json.dumps({**job, "model": str(model)}))
    python = ENVIRONMENTS[engine] / "bin/python"
    script = Path(__file__).parent / SCRIPTS[engine]
    log = folder / "log.txt"
    with log.open("w") as out:
        done = subprocess.run(
            [str(python), str(script), str(question), str(answer)],
            stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        tail = log.read_text()[-3000:]
        raise SystemExit(f"{engine} failed on {folder.name}:\n{tail}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def compare(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest difference of log-probabilities, and prompts whose greedy tokens differ."""
    worst, compared, different = 0.0, 0, []
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        same = a["greedy"] == b["greedy"]
        upto = len(a["greedy"])
        if not same:
            pairs = enumerate(zip(a["greedy"], b["greedy"], strict=False))
            upto = next(i for i, (x, y) in pairs if x != y)
            different.append(
                {"prompt": number, "from_token": upto, "margin_there": a["margins"][upto]}
            )
        lines = [(a["greedy_logprobs"][:upto], b["greedy_logprobs"][:upto])]
        if b["prompt_logprobs"] is not None:
            lines.append((a["prompt_logprobs"], b["prompt_logprobs"]))
        for left, right in lines:
            for x, y in zip(left, right, strict=True):
                worst, compared = max(worst, abs(x - y)), compared + 1
    return {
        "prompts": len(got),
        "logprobs_compared": compared,
        "prompt_logprobs": got[0]["prompt_logprobs"] is not None,
        "largest_logprob_difference": worst,
        "different_rows": different,
    }


def differs(found: dict[str, Any]) -> bool:
    """Whether an engine says something else than transformers."""
    return found["largest_logprob_difference"] > LOGPROB_TARGET or bool(found["different_rows"])


def ratios(runs: dict[str, list[dict[str, Any]]], whole: Any, thin: Any) -> list[dict[str, Any]]:
    """Decode times before and after, medians over the turns, beside what bytes predict."""
    rows = []
    for number, first in enumerate(runs["full"][0]["times"]):
        turns = {
            kind: [one["times"][number]["decode_ms"] for one in done] for kind, done in runs.items()
        }
        full, slim_ms = (statistics.median(turns[kind]) for kind in ("full", "slim"))
        rows.append(
            {
                "context": first["context"],
                "full_ms": full,
                "slim_ms": slim_ms,
                "measured_ratio": full / slim_ms,
                "predicted_ratio": predict_decode(whole, thin, first["context"]),
                "turns": turns,
            }
        )
    return rows


if __name__ == "__main__":
    print(platform.platform())
    sys.exit(main())
