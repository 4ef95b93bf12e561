"""How often the map calls a mere frequency profile shared, and how well it finds planted units.

    python benchmarks/map_null_simulation.py --out docs/results/map_null_simulation.json

Generated gains with known answers. *False sharing*: gains that follow rotary frequency, and share
nothing besides, are called ``universal`` or ``partly shared``, or a unit is named, or the verdict
holds. *Recovery*: units planted at twice the loudness of the rest, on top of such a profile. Takes
about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import gainlens as gl
from gainlens.environment import environment
from gainlens.files import check_writable, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "analysis" / "map"))
from planted_maps import PROFILES, TAILS, f1, planted, profiled

PAIRS = (4, 8, 16, 32, 64, 128)
NULL_SHAPE = (8, 2)
"""Layers and key heads of the gains that share nothing."""
PLANTED_SHAPE = (24, 4, 32)
SETS = ((16, 0), (8, 8), (4, 12), (8, 0), (4, 4), (2, 6), (1, 7))
"""Units loud in every layer, and besides them units loud in one."""
NOISE = (0.1, 0.2, 0.3)
PERMUTATIONS = 300


def frequencies(pairs: int) -> np.ndarray:
    """Those of a rotary model of base 10,000."""
    return 1e4 ** (-np.arange(pairs) / pairs)


def mapped(gains: np.ndarray, seed: int, frequency: np.ndarray | None) -> gl.CoordinateMap:
    """The map without the comparison of single heads, which no answer rests on."""
    return gl.coordinate_map(
        gains, frequency=frequency, heads=False, n_permutations=PERMUTATIONS, seed=seed
    )


def said(cmap: gl.CoordinateMap) -> dict[str, bool]:
    """What the map claims, with the heads of a layer averaged and head by head."""
    shared = ("universal", "partly shared")
    return {
        "by layer": cmap.answer in shared
        or bool(cmap.universal_units)
        or cmap.verdict().status == "holds",
        "by head": cmap.answer_by_head in shared
        or bool(cmap.universal_units_by_head)
        or cmap.verdict(claim="shared by heads").status == "holds",
        "disagree": (cmap.answer in shared) != (cmap.verdict().status == "holds"),
    }


def step(seed: int, pairs: int) -> np.ndarray:
    """A step over frequency, the same in all layers: smooth, and yet no cubic."""
    curve = 1 / (1 + np.exp(-12 * np.linspace(-1, 1, pairs)))
    return np.exp(curve) * profiled(seed, "uniform", "normal", shape=(*NULL_SHAPE, pairs))


def rate(count: int, draws: int) -> dict[str, Any]:
    """A share with its 95% interval."""
    low, high = binomtest(count, draws).proportion_ci()
    return {"rate": count / draws, "interval": [low, high], "count": count, "draws": draws}


def false_sharing(draws: int) -> dict[str, Any]:
    """Rates by number of pairs, slopes and tails, and of every cell."""
    cells, pooled = [], defaultdict(lambda: [0, 0, 0])
    disagree = 0
    for pairs in PAIRS:
        for slopes in PROFILES:
            for tails in TAILS:
                counts = {"by layer": 0, "by head": 0}
                for seed in range(draws):
                    gains = profiled(seed, slopes, tails, shape=(*NULL_SHAPE, pairs))
                    found = said(mapped(gains, seed, frequencies(pairs)))
                    disagree += found.pop("disagree")
                    for name, value in found.items():
                        counts[name] += value
                cells.append({"pairs": pairs, "slopes": slopes, "tails": tails, **counts})
                for key in (f"{pairs} pairs", f"{slopes} slopes", f"{tails} tails", "all"):
                    total = pooled[key]
                    total[0] += counts["by layer"]
                    total[1] += counts["by head"]
                    total[2] += draws
        print(cells[-1], flush=True)
    return {
        "shape": f"{NULL_SHAPE[0]} layers × {NULL_SHAPE[1]} heads, log noise 0.3",
        "target": "at most 2.5%",
        "draws_per_cell": draws,
        "verdict_and_answer_disagree": disagree,
        "by_layer": {k: rate(v[0], v[2]) for k, v in pooled.items()},
        "by_head": {k: rate(v[1], v[2]) for k, v in pooled.items()},
        "cells": cells,
        "note": "4 pairs: a cubic leaves nothing, the answer is 'too few units to say'",
    }


def others(draws: int) -> dict[str, Any]:
    """Models without rotation, and a profile that no cubic follows."""
    found = {}
    for tails in TAILS:
        shape = (*NULL_SHAPE, 32)
        flat = [profiled(s, "common", tails, shape=shape) for s in range(draws)]
        flat = [g / np.exp(1.1 * np.linspace(0, 1, 32)) for g in flat]
        count = sum(said(mapped(g, s, None))["by layer"] for s, g in enumerate(flat))
        found[f"no rotation, {tails} tails (plain null)"] = rate(count, draws)
    for pairs in (32, 128):
        count = sum(
            said(mapped(step(s, pairs), s, frequencies(pairs)))["by layer"] for s in range(draws)
        )
        found[f"a step over frequency, {pairs} pairs (limit: a cubic does not follow it)"] = rate(
            count, draws
        )
    return found


def recovery(seeds: int) -> dict[str, Any]:
    """F1 of planted sets by noise, and what is private."""
    rows = []
    units = PLANTED_SHAPE[-1]
    for noise in NOISE:
        for per in ("layer", "head"):
            for shared, private in SETS:
                scores, heads, answers = [], [], []
                for seed in range(seeds):
                    gains, truth = planted(
                        seed, shared, private, noise=noise, shape=PLANTED_SHAPE, per=per
                    )
                    curve = profiled(seed, "uniform", "normal", shape=PLANTED_SHAPE, noise=0)
                    cmap = mapped(gains * curve, seed, frequencies(units))
                    scores.append(f1(cmap.universal_units, truth))
                    heads.append(f1(cmap.universal_units_by_head, truth))
                    answers.append(cmap.answer)
                rows.append(
                    {
                        "noise": noise,
                        "shared": shared,
                        "private": private,
                        "private_per": per,
                        "f1_mean": float(np.mean(scores)),
                        "f1_min": float(np.min(scores)),
                        "f1_mean_by_head": float(np.mean(heads)),
                        "answers": {a: answers.count(a) for a in sorted(set(answers))},
                    }
                )
        print(rows[-1], flush=True)
    return {
        "shape": list(PLANTED_SHAPE),
        "ratio": 2.0,
        "seeds": seeds,
        "target": "F1 at least 0.95 at twice the loudness and log noise up to 0.3",
        "f1_mean_worst": min(r["f1_mean"] for r in rows),
        "f1_mean_by_noise": {
            str(n): float(np.mean([r["f1_mean"] for r in rows if r["noise"] == n])) for n in NOISE
        },
        "rows": rows,
    }


def main() -> None:
    """Read the command line, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/results/map_null_simulation.json")
    parser.add_argument("--draws", type=int, default=100, help="per cell that shares nothing")
    parser.add_argument("--seeds", type=int, default=10, help="per planted set")
    options = parser.parse_args()
    check_writable(Path(options.out).parent)
    given = {k: v for k, v in vars(options).items() if v != parser.get_default(k)}
    words = [f"--{k} {v}" for k, v in given.items()]
    result = {
        "command": " ".join(["python benchmarks/map_null_simulation.py", *words]),
        "seed": 0,
        "permutations": PERMUTATIONS,
        "false_sharing": false_sharing(options.draws),
        "other_nulls": others(options.draws),
        "recovery": recovery(options.seeds),
        **environment(),
    }
    write_json(options.out, result)
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
