"""Similarity of gain profiles, and its distribution under independent shuffles of units.

All measures here are inner products of two rows after a transformation (scaled to length 1,
centred, ranked, or marked as the k loudest). The mean and variance of each under a shuffle of units
are therefore known exactly; see ``shuffle_moments``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata


def unit_length(x: Float[np.ndarray, "*row unit"]) -> Float[np.ndarray, "*row unit"]:
    """Rows scaled to length 1; a row that is zero up to rounding stays zero."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    scaled: Float[np.ndarray, "*row unit"] = np.divide(
        x, norm, out=np.zeros_like(x), where=norm > 1e-12
    )
    return scaled


def variation(x: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, " row"]:
    """Coefficient of variation of each row: standard deviation over mean; 0 for a zero row."""
    mean = x.mean(1)
    spread: Float[np.ndarray, " row"] = np.divide(
        x.std(1), mean, out=np.zeros_like(mean), where=mean > 0
    )
    return spread


def centred_rows(x: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, "row unit"]:
    """Rows minus their mean, scaled to length 1.

    Inner products of these are Pearson correlations. A row that is constant up to rounding gives
    zero.
    """
    scale = np.abs(x).max(1, keepdims=True)
    y = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    y = y - y.mean(1, keepdims=True)
    y[np.abs(y) < 1e-12] = 0
    return unit_length(y)


def rank_rows(x: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, "row unit"]:
    """Ranks within each row, 1 for the quietest; ties get their mean rank."""
    ranks: Float[np.ndarray, "row unit"] = rankdata(_merged_ties(x), axis=1).astype(np.float64)
    return ranks


def loudest(x: Float[np.ndarray, "row unit"], k: int) -> Float[np.ndarray, "row unit"]:
    """1 for the ``k`` loudest units of each row, else 0; tied units get equal shares.

    Otherwise flat gains would select the same units by index in every row. An all-zero row has no
    loud unit.
    """
    y = _merged_ties(x)
    bar = -np.partition(-y, k - 1, axis=1)[:, k - 1 : k]
    above, level = y > bar, y == bar
    left = k - above.sum(1, keepdims=True)
    marks: Float[np.ndarray, "row unit"] = above + level * (left / level.sum(1, keepdims=True))
    marks[~(x > 0).any(1)] = 0
    return marks


def _merged_ties(x: np.ndarray) -> np.ndarray:
    """Values rounded to 12 digits of the row maximum, so that rounding errors break no tie."""
    scale = np.abs(x).max(1, keepdims=True)
    rounded: np.ndarray = np.round(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0), 12)
    return rounded


def overlap_matrix(marks: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, "row row2"]:
    """Jaccard overlap of the sets that ``loudest`` marked: intersection over union."""
    common = marks @ marks.T
    size = marks.sum(1)
    union = size[:, None] + size[None, :] - common
    jaccard: Float[np.ndarray, "row row2"] = np.divide(
        common, union, out=np.zeros_like(common), where=union > 0
    )
    return jaccard


def shuffle_moments(
    x: Float[np.ndarray, "row unit"],
) -> tuple[Float[np.ndarray, "row row2"], Float[np.ndarray, "row row2"]]:
    """Exact mean and standard deviation of Σ_u x[i, u]·x[j, π(u)] over all shuffles π.

    The mean is n·x̄ᵢ·x̄ⱼ for n units and the variance is SSᵢ·SSⱼ/(n − 1), where SS is the sum of
    squares about the mean.
    """
    n = x.shape[1]
    centre = x.mean(1)
    squares = ((x - centre[:, None]) ** 2).sum(1)
    return n * np.outer(centre, centre), np.sqrt(np.outer(squares, squares) / (n - 1))
