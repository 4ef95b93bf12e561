"""Permutation nulls of a map: nothing is shared between layers.

*What is shuffled.* The units of a whole layer, with one order for all of its heads. The heads of a
layer read the same residual stream and are not independent; shuffling each head on its own would
take "the heads of one layer agree" for "the layers agree". A null with one order per layer is
valid either way, so the layer is the exchangeable unit here.

*Two nulls.* ``plain`` moves a unit anywhere; ``band`` only within its band of neighbouring rotary
frequencies, so a profile that merely follows frequency does not beat it.

*Correction.* A pair's p-value counts shuffles that reach its correlation. The corrected one counts
shuffles in which the largest z over all pairs reaches it (the max-statistic of Westfall and Young,
1993): family-wise error at most the level, whatever the dependence between pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gainlens.analysis.map.similarity import (
    centred_rows,
    loudest,
    rank_rows,
    shuffle_moments,
    unit_length,
)

Orders = Int[np.ndarray, "permutation layer unit"]
TOLERANCE = 1e-5
"""Shuffled and observed values this close count as equal (float32 products)."""


def shuffled_orders(
    n_permutations: int,
    n_layers: int,
    bands: Int[np.ndarray, " unit"] | None,
    n_units: int,
    seed: int,
) -> Orders:
    """Independent random orders of the units for every permutation and layer.

    Args:
        bands: units move only within their band; None lets them move anywhere.
    """
    rng = np.random.default_rng(seed)
    noise = rng.random((n_permutations, n_layers, n_units), dtype=np.float32)
    if bands is None:
        return noise.argsort(-1)
    places = np.argsort(bands, kind="stable")
    orders = np.empty(noise.shape, dtype=np.int64)
    orders[..., places] = (noise.astype(np.float64) + bands).argsort(-1)
    return orders


def in_chunks(orders: Orders, size: int = 100) -> Iterator[Orders]:
    """The same permutations a few at a time, so that memory stays small."""
    for start in range(0, len(orders), size):
        yield orders[start : start + size]


def shuffle(
    x: Float[np.ndarray, "layer *row unit"], orders: Orders
) -> Float[np.ndarray, "permutation layer *row unit"]:
    """``x`` with the units of each layer in the given orders, float32, one copy each."""
    rows = x.astype(np.float32, copy=False)
    layers = np.arange(len(x))
    if x.ndim == 2:
        moved: np.ndarray = rows[layers[:, None], orders]
    else:
        heads = np.arange(x.shape[1])
        moved = rows[layers[:, None, None], heads[:, None], orders[:, :, None, :]]
    return moved


@dataclass(frozen=True, eq=False)
class PairTest:
    """One measure between layers against one null; all ``[layer, layer]``, diagonal included.

    Attributes:
        null_mean: exact mean of the measure over all shuffles.
        null_high: 95th percentile over the shuffles drawn.
        p_raw: one-sided p-value of each pair.
        p_corrected: for the number of pairs.
        p_mean: one-sided p-value of the mean over pairs.
        excess: mean over pairs of the measure less its null mean.
    """

    null_mean: Float[np.ndarray, "layer layer2"]
    null_high: Float[np.ndarray, "layer layer2"]
    p_raw: Float[np.ndarray, "layer layer2"]
    p_corrected: Float[np.ndarray, "layer layer2"]
    p_mean: float
    excess: float


def pair_test(
    rows: Float[np.ndarray, "layer unit"],
    orders: Orders,
    bands: Int[np.ndarray, " unit"] | None,
    alive: Int[np.ndarray, " living"],
) -> PairTest:
    """Test inner products of ``rows`` (see ``gainlens.analysis.map.similarity``) against shuffles.

    Args:
        rows: one per layer.
        orders: from ``shuffled_orders`` with the same ``bands``.
        alive: layers that carry anything; others get a p-value of 1 and enter no mean.
    """
    observed = rows @ rows.T
    mean, spread = shuffle_moments(rows, bands)
    i, j = np.triu_indices(len(alive), 1)
    i, j = alive[i], alive[j]
    values = np.concatenate(
        [
            (moved @ moved.transpose(0, 2, 1))[:, i, j]
            for chunk in in_chunks(orders)
            for moved in [shuffle(rows, chunk)]
        ]
    )
    n = len(values)
    seen, middle, width = observed[i, j], mean[i, j], spread[i, j]
    raw = (1 + (values >= seen - TOLERANCE).sum(0)) / (1 + n)
    usable = width > 1e-9
    z_seen = np.where(usable, (seen - middle) / np.where(usable, width, 1), 0.0)
    z = np.where(usable, (values - middle) / np.where(usable, width, 1), 0.0)
    largest = z.max(1)
    corrected = (1 + (largest[:, None] >= z_seen - TOLERANCE).sum(0)) / (1 + n)
    corrected = np.where(usable, np.maximum(corrected, raw), 1.0)
    p_mean = (1 + int((values.mean(1) >= seen.mean() - TOLERANCE).sum())) / (1 + n)
    return PairTest(
        null_mean=mean,
        null_high=_square(np.quantile(values, 0.95, axis=0), i, j, np.diag(observed)),
        p_raw=_square(np.where(usable, raw, 1.0), i, j, np.ones(len(rows)), 1.0),
        p_corrected=_square(corrected, i, j, np.ones(len(rows)), 1.0),
        p_mean=float(p_mean),
        excess=float((seen - middle).mean()),
    )


def _square(
    values: np.ndarray, i: np.ndarray, j: np.ndarray, diagonal: np.ndarray, rest: float = 0.0
) -> np.ndarray:
    full = np.full((len(diagonal), len(diagonal)), rest)
    full[i, j] = full[j, i] = values
    np.fill_diagonal(full, diagonal)
    return full


def measures(
    profiles: Float[np.ndarray, "layer unit"], tops: tuple[int, ...]
) -> dict[str, Float[np.ndarray, "layer unit"]]:
    """Rows whose inner products are the measures: cosine, centred, spearman, ``top k``.

    The inner product of two ``top k`` rows is the size of the intersection over k; the Jaccard
    overlap is a rising function of it, so both have the same p-value.
    """
    found = {
        "cosine": unit_length(profiles),
        "centred": centred_rows(profiles),
        "spearman": centred_rows(rank_rows(profiles)),
    }
    for k in tops:
        found[f"top {k}"] = loudest(profiles, k) / np.sqrt(k)
    return found
