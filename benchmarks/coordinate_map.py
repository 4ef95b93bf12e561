"""The coordinate map of a model with all of its evidence, as one JSON file.

    python benchmarks/coordinate_map.py
    python benchmarks/coordinate_map.py --scale --out docs/results/coordinate_map_scale.json
    python benchmarks/coordinate_map.py --planted --out docs/results/coordinate_map_planted.json

The first answers for a model: is the map universal, on what evidence, which units, which sinks, at
what cost of sharing. Texts are small so that it takes about ten minutes on two cores: gains choose
on calibration documents, the size of the red line on training documents; validation documents
judge.
The second times the map of 32 layers × 32 heads × 128 units with 1,000 permutations; the third
runs generated models with known truth.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gainlens as gl
from gainlens.analysis.map.across_texts import map_stability
from gainlens.analysis.map.evidence import similarity_table
from gainlens.analysis.map.files import plain
from gainlens.analysis.map.observation import observe_keys
from gainlens.analysis.map.red_line import find_red_line
from gainlens.analysis.map.sharing_cost import cost_of_sharing
from gainlens.analysis.map.sinks import find_sinks
from gainlens.environment import environment
from gainlens.files import check_writable, write_json
from gainlens.probes.probe import DEFAULT_SCORES


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the map page shows, for one model."""
    seed, permutations, seconds = options.seed, options.permutations, {}
    model = gl.load_model(options.model)
    length = min(options.length, int(getattr(model.cfg, "n_ctx", 0) or options.length))

    def text(source: str, n_docs: int, split: str, tokens: int = length) -> torch.Tensor:
        return gl.load_tokens(source, model, n_docs=n_docs, length=tokens, split=split)

    def timed(name: str, start: float) -> None:
        seconds[name] = round(time.perf_counter() - start, 1)

    start = time.perf_counter()
    speeches = text("sotu", options.docs, "calibration")
    first, second = (
        gl.probe_gains(model, half, (*DEFAULT_SCORES, "logit_std"))
        for half in (speeches[0::2], speeches[1::2])
    )
    gains = first + second
    domains = {
        name: gl.probe_gains(model, text(name, options.docs // 2, "calibration"))
        for name in ("stdlib", "pydoc")
    }
    timed("probe", start)
    settings = {"n_permutations": permutations, "seed": seed}
    start = time.perf_counter()
    cmap = gl.coordinate_map(gains, "rms", **settings)
    invariant = gl.coordinate_map(gains, "qk", **settings)
    timed("maps", start)
    table = similarity_table(gains, **settings)
    texts = {"speeches": gains, "speeches, even documents": first,
             "speeches, odd documents": second, "code": domains["stdlib"],
             "technical prose": domains["pydoc"]}  # fmt: skip
    seeds = (seed, seed + 1, seed + 2)
    stability = {
        score: map_stability(texts, seeds=seeds, score=score, n_permutations=permutations)
        for score in ("rms", "qk")
    }
    validation = text("sotu", options.judges, "validation")
    start = time.perf_counter()
    seen = observe_keys(model, speeches[: options.docs // 2], gains, cmap.units)
    sinks = find_sinks(seen, cmap.units, n_permutations=permutations, seed=seed)
    timed("sinks", start)
    start = time.perf_counter()
    scores = options.scores.split(",")
    choosing = text("sotu", options.judges, "training", length // 2)
    cost = cost_of_sharing(
        model, validation, gains, (0.25, 0.5, 0.8), score=scores, choose=choosing, seeds=(seed,)
    )
    timed("sharing_cost", start)
    start = time.perf_counter()
    line = find_red_line(
        model,
        choosing,
        validation,
        gains,
        score=scores,
        margin=options.margin,
        observation=seen,
        patch=validation[: max(2, options.judges // 2), : length // 2],
    )
    timed("red_line", start)
    cmap = replace(cmap, sinks=sinks, sharing_cost=cost, red_line=line, stability=stability["rms"])
    if options.map:
        cmap.save(options.map)
    return {
        "model": options.model,
        "texts": {
            "gains": f"sotu calibration, {len(speeches)} documents × {length} tokens",
            "domains": f"stdlib and pydoc calibration, {options.docs // 2} documents × {length}",
            "sinks": f"the first {options.docs // 2} documents of the gains' text",
            "rankings and red line, chosen on": f"sotu training, {options.judges} documents × "
            f"{length // 2} tokens",
            "judged on": f"sotu validation, {len(validation)} documents × {length} tokens",
            "units patched alone on": f"the first {max(2, options.judges // 2)} of those, "
            f"{length // 2} tokens",
        },
        "answers": answers(cmap, invariant),
        "claims": claims(cmap),
        "map": cmap.to_json(),
        "map_qk": invariant.to_json(),
        "similarity_by_gain": table,
        "stability": {name: s.to_json() for name, s in stability.items()},
        "seconds": seconds,
    }


def answers(cmap: gl.CoordinateMap, invariant: gl.CoordinateMap) -> dict[str, Any]:
    """The five questions of the map page."""
    return {
        "is it universal": {"rms": cmap.answer, "qk": invariant.answer},
        "is it universal, head by head": {
            "rms": cmap.answer_by_head,
            "qk": invariant.answer_by_head,
        },
        "on what evidence": {"rms": repr(cmap), "qk": repr(invariant)},
        "which units": {
            name: {
                "universal": list(m.universal_units),
                "beyond chance": list(m.universal.beyond_chance),
                "universal head by head": list(m.universal_units_by_head),
            }
            for name, m in (("rms", cmap), ("qk", invariant))
        },
        "which sinks": repr(cmap.sinks),
        "at what cost of sharing": repr(cmap.sharing_cost),
        "red line": repr(cmap.red_line),
    }


def claims(cmap: gl.CoordinateMap) -> list[dict[str, Any]]:
    """The claims of the rank-collapse report and the map's own, each with its number."""
    cost = cmap.sharing_cost
    assert cost is not None
    rows = {fraction: cost.rows[cost.row("head", fraction)] for fraction in (0.5, 0.8)}
    note = "one set per head, no training; the surgery decides this claim"
    return [
        {"claim": "half of the key dimensions can be deleted with the loss flat",
         "number": rows[0.5], "note": note},
        {"claim": "at 80% still highly functional", "number": rows[0.8], "note": note},
        {"claim": "cosine above 0.99 between layers: one coordinate system",
         "verdict": cmap.verdict(claim="cosine").to_json()},
        {"claim": "layers share units beyond frequency", "verdict": cmap.verdict().to_json()},
        {"claim": "a sink dimension is a sink at every depth",
         "verdict": cmap.verdict(claim="sinks").to_json()},
    ]  # fmt: skip


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """The map of saved gains of a large model: 32 layers × 32 heads × 128."""
    rng = np.random.default_rng(options.seed)
    gains = np.exp(0.5 * rng.standard_normal((32, 32, 128)))
    frequency = np.tile(1e5 ** (-np.arange(64) / 64), 2)
    torch.set_num_threads(options.threads)
    found = {}
    for name, more in (("frequency and plain null", {"frequency": frequency}), ("plain null", {})):
        for heads in (True, False):
            times, work = [], []
            for _ in range(options.repeats):
                start, cpu = time.perf_counter(), time.process_time()
                gl.coordinate_map(gains, n_permutations=options.permutations, heads=heads, **more)
                times.append(time.perf_counter() - start)
                work.append(time.process_time() - cpu)
            kind = "with heads" if heads else "layers only"
            found[f"{name}, {kind}"] = {
                "median_s": round(float(np.median(times)), 2),
                "all_s": [round(t, 2) for t in times],
                "processor_s": [round(t, 2) for t in work],
            }
    return {
        "shape": list(gains.shape),
        "permutations": options.permutations,
        "threads": options.threads,
        "target": "under 10 s on 2 cores",
        "seconds": found,
    }


def planted(options: argparse.Namespace) -> dict[str, Any]:
    """Known truth: recovery of shared sets, and models that share nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "analysis" / "map"))
    from planted_maps import f1, flat
    from planted_maps import planted as generated

    shape = (24, 4, 32)
    rows = []
    for per in ("layer", "head"):
        for shared, private in ((16, 0), (12, 4), (8, 8), (4, 12), (2, 14), (8, 0), (4, 4),
                                (2, 6), (1, 7), (0, 8), (0, 16)):  # fmt: skip
            for ratio in (2.0, 4.0):
                scores, given = [], []
                for seed in range(20):
                    gains, truth = generated(
                        seed, shared, private, ratio=ratio, shape=shape, per=per
                    )
                    cmap = gl.coordinate_map(gains, heads=False, seed=seed, n_permutations=300)
                    scores.append(f1(cmap.universal_units, truth))
                    given.append(cmap.answer)
                rows.append(
                    {
                        "shared": shared,
                        "private": private,
                        "private_per": per,
                        "ratio": ratio,
                        "f1_mean": float(np.mean(scores)),
                        "f1_min": float(np.min(scores)),
                        "answers": {a: given.count(a) for a in sorted(set(given))},
                    }
                )
    nothing = {}
    for name, make in (
        ("nearly flat, cosine above 0.98", lambda s: flat(s, shape=shape)),
        ("8 private units per layer", lambda s: generated(s, 0, 8, shape=shape)[0]),
        ("16 private units per layer", lambda s: generated(s, 0, 16, shape=shape)[0]),
        ("8 private units per head", lambda s: generated(s, 0, 8, shape=shape, per="head")[0]),
        ("exponential", lambda s: np.random.default_rng(s).exponential(size=shape)),
    ):
        maps = [
            gl.coordinate_map(make(s), heads=False, seed=s, n_permutations=300) for s in range(100)
        ]
        nothing[name] = {
            "not_shared_of_100": sum(m.answer == "not shared" for m in maps),
            "no_universal_unit_of_100": sum(not m.universal_units for m in maps),
            "smallest_mean_cosine": min(m.summary()["cosine"] for m in maps),
        }
    return {
        "shape": list(shape),
        "noise": 0.1,
        "seeds": 20,
        "target": "F1 at least 0.95 at a ratio of 2 or more; not shared in 95 of 100",
        "recovery": rows,
        "f1_mean_worst": min(r["f1_mean"] for r in rows),
        "nothing_shared": nothing,
    }


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="docs/results/coordinate_map_smollm2.json")
    parser.add_argument("--map", help="also save the map itself here")
    parser.add_argument("--docs", type=int, default=16, help="calibration documents")
    parser.add_argument("--judges", type=int, default=8, help="validation documents")
    parser.add_argument("--length", type=int, default=256, help="tokens per document")
    parser.add_argument("--scores", default="qk,std,logit_std", help="rankings tried for cuts")
    parser.add_argument("--margin", type=float, default=0.05, help="of the red line, in nats")
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of --scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--planted", action="store_true")
    options = parser.parse_args()
    check_writable(Path(options.out).parent)
    work = scale if options.scale else planted if options.planted else record
    result = work(options)
    given = {k: v for k, v in vars(options).items() if k != "map" and v != parser.get_default(k)}
    words = [f"--{k}" if v is True else f"--{k} {v}" for k, v in given.items()]
    command = " ".join(["python benchmarks/coordinate_map.py", *words])
    facts = {"command": command, "seed": options.seed}
    write_json(options.out, plain({**facts, **result, **environment()}))
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
