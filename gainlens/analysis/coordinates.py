"""The coordinate map: do layers use the same key dimensions, beyond what chance gives?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.analysis.similarity import cosine_matrix, permutation_null, variation
from gainlens.analysis.verdict import Status, Verdict
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains


@dataclass(frozen=True, eq=False)
class CoordinateMap:
    """Similarity of gains between layers. Heads are averaged after each is scaled to mean 1.

    Attributes:
        cosine: of every pair of layers, ``[layer, layer]``.
        centred_cosine: the same after taking off each layer's mean gain: 0 when nothing is shared.
        null_cosine: mean cosine of each pair over permutations of the units.
        null_high: their 95th percentile.
        cv: coefficient of variation of each layer's gains, ``[layer]``; flat gains (a small CV)
            make any cosine high.
        p_values: one-sided permutation p-value of each pair, uncorrected.
        n_documents: documents behind the gains (0 for a plain array).
        facts: score, stage, permutations, seed.
    """

    cosine: Float[np.ndarray, "layer layer2"]
    centred_cosine: Float[np.ndarray, "layer layer2"]
    null_cosine: Float[np.ndarray, "layer layer2"]
    null_high: Float[np.ndarray, "layer layer2"]
    cv: Float[np.ndarray, " layer"]
    p_values: Float[np.ndarray, "layer layer2"]
    n_documents: int
    facts: dict[str, Any]

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"CoordinateMap({len(self.cv)} layers, mean cosine {s['cosine']:.3f}, null "
            f"{s['null_cosine']:.3f}, centred {s['centred_cosine']:.3f}, CV {s['cv']:.2f})"
        )

    def summary(self) -> dict[str, float]:
        """Means over the pairs of different layers."""
        above = np.triu_indices(len(self.cv), 1)
        return {
            "cosine": float(self.cosine[above].mean()),
            "min_cosine": float(self.cosine[above].min()),
            "null_cosine": float(self.null_cosine[above].mean()),
            "centred_cosine": float(self.centred_cosine[above].mean()),
            "cv": float(self.cv.mean()),
        }

    def verdict(self, threshold: float = 0.99) -> Verdict:
        """ "All layers use the same dimensions (cosine above ``threshold``)".

        Fails when the mean cosine is below the threshold. A cosine above it is evidence only if
        it also beats its permutation null; else the answer is ``undecided``.
        """
        s = self.summary()
        above = np.triu_indices(len(self.cv), 1)
        low, high = (float(q) for q in np.quantile(self.cosine[above], [0.025, 0.975]))
        status: Status = "fails"
        if s["cosine"] > threshold:
            beaten = float((self.p_values[above] < 0.05).mean())
            status = "holds" if beaten > 0.95 else "undecided"
        return Verdict(
            status,
            f"all layers share one coordinate system (cosine above {threshold:g})",
            s["cosine"],
            (low, high),
            threshold,
            self.n_documents,
            f"null {s['null_cosine']:.3f}, centred {s['centred_cosine']:.3f}, CV {s['cv']:.2f}; "
            "the interval spans 95% of the pairs of layers",
        )


def layer_profiles(
    gains: KeyGains | torch.Tensor | np.ndarray, score: str, stage: str
) -> Float[np.ndarray, "layer d_head"]:
    """Mean over heads of gains, each head scaled to mean 1 (an all-zero head stays zero)."""
    values = gains.score(score, stage=stage) if isinstance(gains, KeyGains) else gains  # type: ignore[arg-type]
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 3:
        raise InputError(f"gains have shape {x.shape}: expected [layer, kv_head, d_head]")
    if len(x) < 2:
        raise InputError("gains have one layer only: a map compares layers, expected two or more")
    if not np.isfinite(x).all():
        raise InputError("gains hold NaN or infinity")
    if (x < 0).any():
        raise InputError("gains hold negative values: expected gains of zero or above")
    mean = x.mean(-1, keepdims=True)
    scaled = np.divide(x, mean, out=np.zeros_like(x), where=mean > 0)
    profiles: Float[np.ndarray, "layer d_head"] = scaled.mean(1)
    return profiles


def coordinate_map(
    gains: KeyGains | torch.Tensor | np.ndarray,
    score: str = "rms",
    stage: str = "rotated",
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> CoordinateMap:
    """Compare the gains of all layers.

    Args:
        gains: ``KeyGains``, or a non-negative array ``[layer, kv_head, d_head]``.
        score, stage: of ``KeyGains``; ignored for an array.
        n_permutations: of the null.
        seed: of the permutations.

    Raises:
        InputError: one layer only, NaN, negative gains, another number of axes.
    """
    if n_permutations < 1:
        raise InputError(f"n_permutations={n_permutations} is not above 0")
    x = layer_profiles(gains, score, stage)
    cosine = cosine_matrix(x)
    null = permutation_null(x, n_permutations, seed)
    centred = cosine_matrix(x - x.mean(1, keepdims=True))
    return CoordinateMap(
        cosine=cosine,
        centred_cosine=centred,
        null_cosine=null.mean(0),
        null_high=np.quantile(null, 0.95, axis=0),
        cv=variation(x),
        p_values=(1 + (null >= cosine).sum(0)) / (1 + n_permutations),
        n_documents=gains.n_documents if isinstance(gains, KeyGains) else 0,
        facts={
            "score": score if isinstance(gains, KeyGains) else "array",
            "stage": stage if isinstance(gains, KeyGains) else "array",
            "n_permutations": n_permutations,
            "seed": seed,
        },
    )
