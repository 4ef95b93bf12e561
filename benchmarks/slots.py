"""What half of SmolLM2's keys cost: per layer by refit, and in one universal set of rotary slots.

    python benchmarks/slots.py [--speeches 12] [--files 12] [--length 512]

Both cuts are ``gainlens.best_cut``: ranked by ``fisher``, fitted to the intact attention logits on
calibration speeches and source files, without training. Validation speeches that chose nothing
judge them, short ones and long ones by position.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch

import gainlens as gl
from gainlens.ablation import Cut, fit_slots
from gainlens.ablation.recipe import ranking
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.files import write_json

BUCKETS = (0, 64, 256, 512, 1024, 2048)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--speeches", type=int, default=12, help="calibration speeches")
    parser.add_argument("--files", type=int, default=12, help="calibration source files")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--stride", type=int, help="every how many positions a query is fitted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--judge", type=int, default=8, help="validation speeches of 256 tokens")
    parser.add_argument(
        "--judge-long", type=int, default=4, help="validation speeches of --context"
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder that keeps gains and cuts")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()

    def said(text: str) -> None:
        print(f"{time.time() - started:6.0f} s  {text}", flush=True)

    model = gl.load_model(args.model)
    texts = [
        gl.load_tokens(source, model, n_docs=n, length=args.length, split="calibration")
        for source, n in (("sotu", args.speeches), ("stdlib", args.files))
        if n
    ]
    calibration = [row for text in texts for row in text]
    kept = args.cache
    if kept is not None and (kept / "gains.safetensors").exists():
        gains = gl.KeyGains.load(kept / "gains.safetensors")
    else:
        gains = gl.probe_gains(
            model, ranking(calibration), scores=("fisher",), tokens_per_batch=512, progress=False
        )
        if kept is not None:
            gains.save(kept / "gains.safetensors")
    said("gains")
    judges = {
        "short": gl.load_tokens("sotu", model, n_docs=args.judge, length=256, split="validation"),
        "long": gl.load_tokens(
            "sotu", model, n_docs=args.judge_long, length=args.context, split="validation"
        ),
    }
    evaluator = Evaluator(model)
    intact = {name: evaluator.tokens(text).double() for name, text in judges.items()}
    said("intact")
    rows = []
    for name in ("layer", "universal"):
        cut = _cut(model, calibration, gains, name, args)
        said(f"{name} fitted: {cut.facts}")
        if kept is not None:
            cut.save(kept / f"{name}.safetensors")
        row = {"cut": name, "kind": cut.kind, "fit": _plain(cut.facts)}
        for text, tokens in judges.items():
            rise = evaluator.tokens(tokens, cut).double() - intact[text]
            row[text] = _summary(rise)
            if text == "long":
                row["by_position"] = _by_position(rise)
        rows.append(row)
        said(f"{name}: {[row[n] for n in ('short', 'long', 'by_position')]}")
    write_json(
        args.out,
        {
            "what": "rise of the validation loss in nats per token, no training",
            "model": args.model,
            "fraction": args.fraction,
            "text": {
                "calibration": {"sotu": args.speeches, "stdlib": args.files},
                "length": args.length,
                "calibration_sha256": text_fingerprint(calibration),
                "validation": {"sotu, 256": args.judge, f"sotu, {args.context}": args.judge_long},
                "validation_sha256": {n: text_fingerprint(t) for n, t in judges.items()},
            },
            "context": args.context,
            "seed": args.seed,
            "intact_loss": {name: float(loss.mean()) for name, loss in intact.items()},
            "cuts": rows,
            "seconds": time.time() - started,
            **environment(),
        },
    )


def _cut(model, calibration, gains, scope: str, args) -> Cut:
    if scope == "universal":
        return fit_slots(
            model, calibration, gains, args.fraction, scope, rounds=args.rounds,
            stride=args.stride, progress=False,
        )  # fmt: skip
    mask = gl.KeyMask.quietest(gains, args.fraction, "fisher", scope)
    return gl.ablation.refit(
        model, calibration, mask, rounds=args.rounds, stride=args.stride, progress=False
    )


def _plain(facts: dict) -> dict:
    return {k: v for k, v in facts.items() if k not in ("fingerprint", "text", "documents")}


def _summary(rise: torch.Tensor) -> dict:
    by_document = rise.mean(1)
    error = float(by_document.std() / len(by_document) ** 0.5) if len(by_document) > 1 else None
    return {"rise": float(by_document.mean()), "standard_error": error}


def _by_position(rise: torch.Tensor) -> dict:
    spans = itertools.pairwise(BUCKETS)
    return {f"{a}-{b}": float(rise[:, a:b].mean()) for a, b in spans if a < rise.shape[1]}


if __name__ == "__main__":
    main()
