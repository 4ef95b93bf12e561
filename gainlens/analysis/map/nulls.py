"""Permutation nulls of a map: the hypothesis that layers share nothing.

*What is shuffled.* The units of a whole layer, with one order for all of its heads. The heads of a
layer read the same residual stream and are not independent. Shuffling each head on its own would
confuse agreement of heads within a layer with agreement between layers. A null with one order per
layer is valid in both cases, so the layer is the exchangeable unit here.

*Two nulls.* ``plain`` permutes the gains of a layer freely. ``frequency`` keeps each layer's smooth
profile over rotary frequency and permutes only the residuals (``frequency_profile``). The answer
uses ``frequency`` whenever units rotate.

*Correction.* A pair's p-value counts shuffles that reach its correlation. The corrected
p-value counts shuffles in which the largest z over all pairs reaches it (the max-statistic of
Westfall and Young, 1993). The family-wise error is at most the level, for any dependence between
pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gainlens.analysis.map.similarity import centred_rows, loudest, rank_rows, unit_length
from gainlens.brief import brief

Orders = Int[np.ndarray, "permutation layer unit"]
TOLERANCE = 1e-5
"""Shuffled and observed values this close count as equal (float32 products)."""


def shuffled_orders(
    n_permutations: int, groups: Int[np.ndarray, "layer unit"], seed: int
) -> Orders:
    """Independent random orders of the units for every permutation and layer.

    Args:
        n_permutations: number of permutations.
        groups: units are permuted only within their group.
        seed: seed of the draws.
    """
    rng = np.random.default_rng(seed)
    noise = rng.random((n_permutations, *groups.shape))
    places = np.broadcast_to(np.argsort(groups, axis=-1, kind="stable"), noise.shape)
    orders = np.empty(noise.shape, dtype=np.int64)
    np.put_along_axis(orders, places, (noise + groups).argsort(-1), -1)
    return orders


def in_chunks(orders: Orders, size: int = 100) -> Iterator[Orders]:
    """The same permutations in chunks, to limit memory."""
    for start in range(0, len(orders), size):
        yield orders[start : start + size]


def shuffle(
    x: Float[np.ndarray, "layer *place unit"], orders: Orders
) -> Float[np.ndarray, "permutation layer *place unit"]:
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
        null_mean: mean of the measure over shuffles, exact under the plain null.
        null_high: 95th percentile over the shuffles drawn.
        p_raw: one-sided p-value of each pair.
        p_corrected: p-value corrected for the number of pairs.
        p_mean: one-sided p-value of the mean over pairs.
        excess: mean over pairs of the measure minus its null mean.
    """

    null_mean: Float[np.ndarray, "layer layer2"]
    null_high: Float[np.ndarray, "layer layer2"]
    p_raw: Float[np.ndarray, "layer layer2"]
    p_corrected: Float[np.ndarray, "layer layer2"]
    p_mean: float
    excess: float

    __repr__ = brief


def pair_test(
    rows: Float[np.ndarray, "layer unit"],
    null: Iterable[Float[np.ndarray, "permutation layer unit"]],
    alive: Int[np.ndarray, " living"],
    moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> PairTest:
    """Test inner products of ``rows`` (see ``gainlens.analysis.map.similarity``) against a null.

    Args:
        rows: one per layer.
        null: the same rows under the null, a few permutations at a time.
        alive: layers with a gain above zero; others get a p-value of 1 and are excluded from means.
        moments: exact mean and standard deviation ``[layer, layer]`` under the null, if known.
    """
    observed = rows @ rows.T
    i, j = np.triu_indices(len(alive), 1)
    i, j = alive[i], alive[j]
    values = np.concatenate([(m @ m.transpose(0, 2, 1))[:, i, j] for m in null]).astype(np.float64)
    n = len(values)
    seen = observed[i, j]
    if moments is None:
        middle, width = values.mean(0), values.std(0)
    else:
        middle, width = moments[0][i, j], moments[1][i, j]
    raw = (1 + (values >= seen - TOLERANCE).sum(0)) / (1 + n)
    usable = width > 1e-9
    z_seen = np.where(usable, (seen - middle) / np.where(usable, width, 1), 0.0)
    z = np.where(usable, (values - middle) / np.where(usable, width, 1), 0.0)
    largest = z.max(1)
    corrected = (1 + (largest[:, None] >= z_seen - TOLERANCE).sum(0)) / (1 + n)
    corrected = np.where(usable, np.maximum(corrected, raw), 1.0)
    p_mean = (1 + int((values.mean(1) >= seen.mean() - TOLERANCE).sum())) / (1 + n)
    diagonal, ones = np.diag(observed), np.ones(len(rows))
    mean = _square(middle, i, j, diagonal) if moments is None else moments[0]
    return PairTest(
        null_mean=mean,
        null_high=_square(np.quantile(values, 0.95, axis=0), i, j, diagonal),
        p_raw=_square(np.where(usable, raw, 1.0), i, j, ones, 1.0),
        p_corrected=_square(corrected, i, j, ones, 1.0),
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
    overlap is an increasing function of it, so both have the same p-value.
    """
    found = {
        "cosine": unit_length(profiles),
        "centred": centred_rows(profiles),
        "spearman": centred_rows(rank_rows(profiles)),
    }
    for k in tops:
        found[f"top {k}"] = loudest(profiles, k) / np.sqrt(k)
    return found
