"""Does a score predict what cutting one unit costs?

    python benchmarks/prediction.py --model tiny [--documents 16] [--minutes 15]
    python benchmarks/prediction.py --model tiny --again    # recorded cuts, missing scores

A unit is a rotary pair of one key head (a dimension where keys do not rotate). A seeded sample of
units is cut one at a time, on validation documents that chose nothing, and the rise of the loss is
measured, paired by document: only the layers from the cut one on are run again. The scores come
from calibration documents. Beside them stands the first-order estimate of the rise, which has a
sign: minus the sum of key times gradient of the loss (attribution patching of the key to zero).

Reported is Spearman's rank correlation with the measured rise and with its size, over all sampled
units and within layers, with a 95% bootstrap interval over units. (Documents are not resampled:
fewer distinct ones make the rise noisier, which lowers every correlation. What their number costs
is the ceiling below.)

Most rises are small and noisy, so no score can reach 1. The ceiling is estimated by the measured
rise itself: the rank correlation between halves of the documents, raised to their full number by
Spearman and Brown, is its reliability, and a perfect score could reach the root of that.

The record keeps one entry per model; a run replaces its own. It stops after the document in which
the minutes ran out, so the number of documents is in the record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

import gainlens as gl
from gainlens.ablation.key_cache import KeyCache
from gainlens.analysis.patching import attribution_patching, unit_dims
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.environment import environment
from gainlens.files import write_json
from gainlens.model import key_sites
from gainlens.model.fingerprint import model_fingerprint

FIRST_ORDER = "first order"
SCORES = ("rms", "std", "qk", "logit_std", "fisher")
RESAMPLES = 1000
HALVES = 200


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a name or a folder")
    parser.add_argument("--name", help="of the model in the record (default: --model)")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--units", type=int, default=200, help="units to cut, one at a time")
    parser.add_argument("--calibration", type=int, default=16, help="documents of the scores")
    parser.add_argument("--documents", type=int, default=16, help="validation documents, at most")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=15, help="of cutting, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", action="store_true", help="keep the cuts and scores of the record"
    )
    parser.add_argument("--out", default="docs/results/prediction.json")
    args = parser.parse_args()
    path, name = Path(args.out), args.name or args.model
    kept = recorded(path)
    if args.again:
        args.calibration = kept[name]["calibration_documents"]
        args.seed, args.units = kept[name]["seed"], len(kept[name]["units"])
    model = gl.load_model(args.model)
    started = time.monotonic()
    length = min(args.length, int(model.cfg.n_ctx))
    calibration, validation = (
        gl.load_tokens(args.text, model, n_docs=n, length=length, split=split)
        for n, split in ((args.calibration, "calibration"), (args.documents, "validation"))
    )
    found = units(model)
    chosen = np.random.default_rng(args.seed).permutation(len(found))[: args.units]
    sample = [found[i] for i in sorted(chosen)]
    fingerprint = model_fingerprint(model)
    old = kept[name] if args.again else None
    if old and (old["model"] != fingerprint or old["units"] != [list(u) for u in sample]):
        raise SystemExit(f"{path} holds cuts of other weights or other units")
    scores = scored(model, calibration, sample, old["scores"] if old else {})
    probing = time.monotonic() - started
    print(f"{probing:6.0f} s  scores", flush=True)
    if old:
        rises, spent = np.array(old["rise_by_document"]), old["seconds"]["cuts"]
        probing += old["seconds"]["scores"]
    else:
        rises, spent = measured(model, validation, sample, args.minutes)
    entry = {
        "model": fingerprint,
        "architecture": key_sites(model).architecture,
        "unit": "pair" if len(sample[0]) > 3 else "dimension",
        "text": args.text,
        "length": length,
        "calibration_documents": len(calibration),
        "documents": len(rises),
        "all_units": len(found),
        "seed": args.seed,
        "seconds": {"scores": round(probing, 1), "cuts": round(spent, 1)},
        "results": correlations(scores, rises, [unit[0] for unit in sample], args.seed),
        "units": [list(unit) for unit in sample],
        "scores": {name: [float(f"{x:.5g}") for x in column] for name, column in scores.items()},
        "rise": [float(f"{x:.5g}") for x in rises.mean(0)],
        "rise_by_document": [[float(f"{x:.3g}") for x in row] for row in rises],
        **environment(),
    }
    kept = recorded(path)  # another run may have written meanwhile
    write_json(
        path,
        {
            "what": "rank correlation of each score with the rise of the loss when one unit is cut",
            "models": {**kept, name: entry},
        },
    )
    print(json.dumps(entry["results"], indent=1))


def recorded(path: Path) -> dict[str, Any]:
    """The entries of the record, by model."""
    return json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}


def scored(
    model: Any,
    tokens: torch.Tensor,
    sample: Sequence[tuple[int, ...]],
    known: dict[str, list[float]],
) -> dict[str, list[float]]:
    """Every score of every unit of the sample; those that are known are not computed again."""
    scores = dict(known)
    if missing := [name for name in SCORES if name not in known]:
        gains = gl.probe_gains(model, tokens, missing, progress=False)
        for name in missing:
            values = gains.score(name, unit="pair")
            scores[name] = [float(values[unit[0], unit[1], unit[2]]) for unit in sample]
    if FIRST_ORDER not in scores:
        estimate = first_order(model, tokens)
        scores[FIRST_ORDER] = [estimate[tuple(unit)] for unit in sample]
    return scores


def units(model: Any) -> list[tuple[int, ...]]:
    """All units: layer, key head, and the dimensions of the unit."""
    sites = key_sites(model)
    dims = unit_dims(sites, "pair")
    return [(*place, *unit) for place in np.ndindex(*sites.shape[:2]) for unit in dims]


def first_order(model: Any, tokens: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The estimated rise in nats per token of every unit, mean over documents."""
    total = 0.0
    for document in tokens:
        batch = document[None]
        zeros = KeyCache([torch.zeros_like(keys) for keys in KeyCache.run(model, batch).keys])

        def loss(logits: torch.Tensor, batch: torch.Tensor = batch) -> torch.Tensor:
            wanted = batch[0, 1:].to(logits.device)
            return torch.nn.functional.cross_entropy(logits[0, :-1].float(), wanted)

        total = total + attribution_patching(model, zeros, batch, metric=loss).effect
    mean = np.asarray(total) / len(tokens)
    return {unit: float(x) for unit, x in zip(units(model), mean.reshape(-1), strict=True)}


def measured(
    model: Any, tokens: torch.Tensor, sample: Sequence[tuple[int, ...]], minutes: float
) -> tuple[np.ndarray, float]:
    """Rise of the loss in nats per token, ``[document, unit]``, and the seconds that it took."""
    evaluator = Evaluator(model)
    started, rows = time.monotonic(), []
    shape = key_sites(model).shape
    for document in tokens:
        batch = document[None]
        intact = evaluator.tokens(batch).double().mean()
        residuals = evaluator.residuals(batch)
        row = []
        for layer, head, *dims in sample:
            keep = torch.ones(shape, dtype=torch.bool)
            keep[layer, head, dims] = False
            cut = evaluator.tokens_from(layer, batch, gl.KeyMask(keep), residuals)
            row.append(float(cut.double().mean() - intact))
        rows.append(row)
        spent = time.monotonic() - started
        print(f"{spent:6.0f} s  {len(rows)} documents", flush=True)
        if spent > 60 * minutes:
            break
    return np.array(rows), time.monotonic() - started


def correlations(
    scores: dict[str, list[float]], rises: np.ndarray, layers: Sequence[int], seed: int
) -> dict[str, Any]:
    """Rank correlations of every score with the mean rise, and the ceiling by its noise.

    Args:
        scores: by name, a value per unit.
        rises: ``[document, unit]``, in nats.
        layers: the layer of each unit.
        seed: of the bootstrap and of the halves.
    """
    rng = np.random.default_rng(seed)
    where = np.asarray(layers)
    columns = {name: np.asarray(column) for name, column in scores.items()}
    draws = rng.integers(rises.shape[1], size=(RESAMPLES, rises.shape[1]))
    mean = rises.mean(0)
    made = {}
    for name, column in columns.items():
        again = [
            (spearman(column[u], mean[u]), inside(column[u], mean[u], where[u])) for u in draws
        ]
        ends = np.quantile(again, (0.025, 0.975), axis=0)
        made[name] = {
            "spearman": spearman(column, mean),
            "interval": ends[:, 0].tolist(),
            "within_layers": inside(column, mean, where),
            "within_interval": ends[:, 1].tolist(),
            "with_size": spearman(np.abs(column), np.abs(mean)),
        }
    best = max(made, key=lambda name: made[name]["spearman"])
    return {
        "scores": made,
        "best": best,
        "noise": reliability(rises, seed),
        "rise_quantiles": np.quantile(mean, (0, 0.1, 0.5, 0.9, 1)).tolist(),
        "share_negative": float((mean < 0).mean()),
    }


def reliability(rises: np.ndarray, seed: int) -> dict[str, float | None]:
    """Split-half reliability of the mean rise, and the correlation that a perfect score reaches."""
    n = len(rises)
    if n < 2:
        return {"halves": None, "reliability": None, "ceiling": None}
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(HALVES):
        order = rng.permutation(n)
        a, b = rises[order[: n // 2]], rises[order[n // 2 : 2 * (n // 2)]]
        found.append(spearman(a.mean(0), b.mean(0)))
    halves = float(np.mean(found))
    longer = n / (n // 2)  # how much longer the whole text is than a half
    whole = max(0.0, longer * halves / (1 + (longer - 1) * halves))
    return {"halves": halves, "reliability": whole, "ceiling": float(np.sqrt(whole))}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, with mean ranks for ties; 0 for a constant."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0


def inside(a: np.ndarray, b: np.ndarray, layers: np.ndarray) -> float:
    """Spearman's correlation of ranks taken within each layer."""
    return spearman(within(a, layers), within(b, layers))


def within(values: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Each value's rank among the units of its layer, from -1/2 to 1/2."""
    made = np.zeros(len(values))
    for layer in np.unique(layers):
        here = layers == layer
        made[here] = (rankdata(values[here]) - 0.5) / here.sum() - 0.5
    return made


if __name__ == "__main__":
    main()
