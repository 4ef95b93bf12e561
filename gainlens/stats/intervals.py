"""Confidence intervals for the mean over documents. Documents, not tokens, are independent."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import stats

from gainlens.errors import InputError


@lru_cache(maxsize=4096)
def t_quantile(level: float, freedom: int) -> float:
    """Half the width of Student's two-sided interval, in standard errors."""
    return float(stats.t.ppf(0.5 + level / 2, freedom))


def t_interval(
    differences: Float[np.ndarray, " document"], level: float = 0.95
) -> tuple[float, float]:
    """Student's interval for the mean of paired differences.

    Args:
        differences: one per document, e.g. loss with the cut minus loss without, in nats.
        level: coverage, above 0 and below 1.

    Returns:
        (low, high); both infinite with fewer than two documents.

    Raises:
        InputError: NaN or infinity among the differences, or a level outside 0..1.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level!r} is outside 0..1")
    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("differences hold NaN or infinity, so no interval can be given")
    if len(values) < 2:
        return -math.inf, math.inf
    spread = values.std(ddof=1) / math.sqrt(len(values))
    half = t_quantile(level, len(values) - 1) * float(spread)
    mean = float(values.mean())
    return mean - half, mean + half


def bootstrap_interval(
    differences: Float[np.ndarray, " document"],
    level: float = 0.95,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap-t interval for the mean of paired differences: documents drawn with replacement.

    Each resample's mean is studentised by its own spread (Efron and Tibshirani 1993, ch. 12), so
    skewed differences give a skewed interval; a plain percentile interval is too short for the
    few documents that a surgery has.

    Args:
        differences: one per document, in nats.
        level: coverage, above 0 and below 1.
        resamples: number of bootstrap resamples, at least 100.
        seed: of the draws; the same on every machine.

    Returns:
        (low, high); both infinite with fewer than two documents.

    Raises:
        InputError: as for ``t_interval``, or too few resamples.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level!r} is outside 0..1")
    if resamples < 100:
        raise InputError(f"resamples={resamples!r}: expected at least 100")
    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("differences hold NaN or infinity, so no interval can be given")
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    mean, spread = values.mean(), values.std(ddof=1) / math.sqrt(n)
    if spread == 0:
        return float(mean), float(mean)
    drawn = values[np.random.default_rng(seed).integers(0, n, (resamples, n))]
    spreads = drawn.std(1, ddof=1) / math.sqrt(n)
    usable = spreads > 1e-9 * spread  # a resample of one document alone has no spread
    ratios = (drawn.mean(1)[usable] - mean) / spreads[usable]
    if len(ratios) < 100:
        return t_interval(values, level)
    low, high = np.quantile(ratios, [0.5 - level / 2, 0.5 + level / 2])
    return float(mean - high * spread), float(mean - low * spread)


def documents_to_decide(
    differences: Float[np.ndarray, " document"], margin: float, level: float = 0.95
) -> int | None:
    """How many more documents would decide a claim, if mean and spread stay what they are.

    Args:
        differences: one per document, in nats.
        margin: the bound set beforehand.
        level: coverage of the two-sided interval.

    Returns:
        Zero when it is decided; None with fewer than two documents, or when the mean sits on the
        margin so closely that a million would not do.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:
        return None
    gap, spread = abs(float(values.mean()) - margin), float(values.std(ddof=1))

    def decided(count: int) -> bool:
        return t_quantile(level, count - 1) * spread / math.sqrt(count) < gap

    if decided(n):
        return 0
    low, high = n, 2 * n
    while not decided(high):
        low, high = high, 2 * high
        if high > 1_000_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high - n


def documents_by_scaling(
    interval: tuple[float, float], estimate: float, margin: float, n_documents: int
) -> int | None:
    """As ``documents_to_decide`` for an undecided claim and an interval of any kind.

    Its ends are taken to close in on the estimate as 1/sqrt(n).

    Args:
        interval: around the estimate, holding the margin.
        estimate: mean so far, in nats.
        margin: the bound set beforehand.
        n_documents: that gave the interval.

    Returns:
        One or more; None where it can't be said, or a million would not do.
    """
    gap = abs(estimate - margin)
    reach = interval[1] - estimate if estimate < margin else estimate - interval[0]
    if gap == 0 or not math.isfinite(reach):
        return None
    total = n_documents * (reach / gap) ** 2
    return max(1, math.ceil(total) - n_documents) if total < 1_000_000 else None
