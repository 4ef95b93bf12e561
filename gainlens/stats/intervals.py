"""Confidence intervals for the mean over documents. Documents are independent; tokens are not."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import stats

from gainlens.errors import InputError

RESAMPLES = 4000
FEW = 6
"""Minimum number of documents for the bootstrap: with fewer, one resample in a thousand repeats a
single document."""


@lru_cache(maxsize=4096)
def t_quantile(level: float, freedom: int) -> float:
    """Half-width of Student's two-sided interval, in standard errors."""
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
        InputError: the differences hold NaN or infinity, or the level is outside 0..1.
    """
    _check_level(level)
    values, _ = grouped(differences)
    if len(values) < 2:
        return -math.inf, math.inf
    spread = values.std(ddof=1) / math.sqrt(len(values))
    half = t_quantile(level, len(values) - 1) * float(spread)
    mean = float(values.mean())
    return mean - half, mean + half


def group_means(
    differences: Float[np.ndarray, " document"],
    groups: Sequence[Hashable] | None = None,
) -> Float[np.ndarray, " group"]:
    """The mean of each group of documents; the differences themselves without groups.

    Args:
        differences: one per document.
        groups: a label per document, or None.

    Raises:
        InputError: as for ``bootstrap_interval``.
    """
    sums, sizes = grouped(differences, groups)
    means: Float[np.ndarray, " group"] = sums / sizes
    return means


def bootstrap_interval(
    differences: Float[np.ndarray, " document"],
    level: float = 0.95,
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap-t interval for the mean of paired differences, resampling documents.

    Each resample's mean is studentised by its own standard error (Efron and Tibshirani 1993,
    ch. 12), so skewed differences give a skewed interval. A plain percentile interval is too short
    for the small number of documents in a typical surgery.

    Args:
        differences: one per document, in nats.
        level: coverage, above 0 and below 1.
        groups: a label per document. Documents with the same label are dependent (windows of one
            text) and are drawn together. By default all documents are independent.
        resamples: number of bootstrap resamples, at least 100.
        seed: of the draws; the same on every machine.

    Returns:
        (low, high). Both are infinite with fewer than two documents or groups. One end is infinite
        if the documents agree so closely that resamples without spread determine it. With fewer
        than ``FEW`` documents or groups, the interval is Student's.

    Raises:
        InputError: as for ``t_interval``; too few resamples; or not one label per document.
    """
    _check_level(level)
    sums, sizes = grouped(differences, groups)
    error = (1 - level) / 2
    low, high = bootstrap_ends(sums[None], sizes, (error, error), resamples=resamples, seed=seed)
    return float(low[0]), float(high[0])


def bootstrap_ends(
    sums: Float[np.ndarray, "draw group"],
    sizes: Float[np.ndarray, " group"],
    errors: tuple[float, float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """Ends of the bootstrap-t interval, for many samples of equal size at once.

    Args:
        sums: the total of each group of documents (for single documents, their values).
        sizes: number of documents in each group.
        errors: probabilities that the mean is below the lower end and above the upper end.
        resamples, seed: see ``bootstrap_interval``.

    Raises:
        InputError: too few resamples.
    """
    if resamples < 100:
        raise InputError(f"resamples={resamples!r}: expected at least 100")
    n = len(sizes)
    if n < 2:
        return np.full(len(sums), -np.inf), np.full(len(sums), np.inf)
    mean, spread = _mean_and_spread(sums, sizes)
    if n < FEW:
        quantiles = [t_quantile(1 - 2 * error, n - 1) for error in errors]
        return mean - quantiles[0] * spread, mean + quantiles[1] * spread
    ratios = _studentised(sums, sizes, resamples, seed)
    # Order statistics, rounded outwards: no interpolation is possible between -inf and a number.
    last = resamples - 1
    places = math.floor(errors[1] * last), math.ceil((1 - errors[0]) * last)
    ratios.partition(places, axis=1)
    low, high = ratios[:, places[0]], ratios[:, places[1]]
    with np.errstate(invalid="ignore"):
        ends = mean - high * spread, mean - low * spread
    still = spread == 0
    return np.where(still, mean, ends[0]), np.where(still, mean, ends[1])


def bootstrap_chances(
    differences: Float[np.ndarray, " document"],
    margin: float,
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """One-sided p-values that correspond to the ends of ``bootstrap_interval``.

    Returns:
        For the hypotheses that the mean is at least, and at most, the margin. An end of the
        interval is clear of the margin approximately when its p-value is below that end's error.
    """
    sums, sizes = grouped(differences, groups)
    if len(sizes) < 2:
        return 1.0, 1.0
    mean, spread = (float(x[0]) for x in _mean_and_spread(sums[None], sizes))
    if spread == 0:
        return float(mean >= margin), float(mean <= margin)
    at = (mean - margin) / spread
    if len(sizes) < FEW:
        below = float(stats.t.cdf(at, len(sizes) - 1))
        return below, 1 - below
    ratios = _studentised(sums[None], sizes, resamples, seed)[0]
    below, above = int((ratios <= at).sum()), int((ratios >= at).sum())
    return (below + 1) / (resamples + 1), (above + 1) / (resamples + 1)


def grouped(
    differences: Float[np.ndarray, " document"],
    groups: Sequence[Hashable] | np.ndarray | None = None,
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Total and number of documents of each group, in order of first appearance.

    Raises:
        InputError: the differences hold NaN or infinity, or there is not one label per document.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("differences hold NaN or infinity, so there is no interval")
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise InputError(
            f"groups has {len(groups)} labels for {len(values)} documents: expected one each"
        )
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(label, len(numbers)) for label in groups], dtype=int)
    sizes = np.bincount(places, minlength=len(numbers)).astype(np.float64)
    return np.bincount(places, values, len(numbers)), sizes


def _mean_and_spread(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over documents and its standard error over groups, using a ratio estimator."""
    n, total = len(sizes), sizes.sum()
    mean = sums.sum(1) / total
    residuals = sums - mean[:, None] * sizes
    spread = np.sqrt((residuals**2).sum(1) * n / (n - 1)) / total
    # Equal documents differ from their mean only by rounding.
    same = spread <= 1e-12 * np.abs(sums).max(1, initial=0.0)
    return mean, np.where(same, 0.0, spread)


def _studentised(sums: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(Resample mean - mean) / standard error of the resample, ``[draw, resample]``.

    Means and standard errors are matrix products with the counts of how often each group was
    drawn. A resample without spread counts as infinitely far from the mean. Leaving it out would
    hide that nine unharmed documents and one harmed are often drawn as ten unharmed.
    """
    n = len(sizes)
    mean, spread = _mean_and_spread(sums, sizes)
    centred = sums - mean[:, None] * sizes
    ratios = np.empty((len(sums), resamples))
    alike, start = bool((sizes == sizes[0]).all()), 0
    for counts in _drawn(n, resamples, seed):
        total = counts @ sizes
        shift = centred @ counts.T / total
        # With equal groups, the middle term needs no matrix product.
        cross = sizes[0] * shift * total if alike else (centred * sizes) @ counts.T
        squares = centred**2 @ counts.T - 2 * shift * cross + shift**2 * (counts @ sizes**2)
        spreads = np.sqrt(np.maximum(squares, 0.0) * n / (n - 1)) / total
        flat = spreads <= 1e-6 * spread[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = shift / spreads
        far = np.where(np.abs(shift) > 1e-9 * spread[:, None], np.copysign(np.inf, shift), 0.0)
        ratios[:, start : start + len(counts)] = np.where(flat, far, part)
        start += len(counts)
    return ratios


def _drawn(n: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """Counts of how often each of ``n`` groups is drawn, ``[resample, n]``, in chunks."""
    return _kept_draws(n, resamples, seed) if n * resamples <= 2**21 else _draw(n, resamples, seed)


def _draw(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng, step = np.random.default_rng(seed), max(1, 2**20 // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        places = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * n)
        yield counts.reshape(rows, n).astype(np.float64)


@lru_cache(maxsize=4)
def _kept_draws(n: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_draw(n, resamples, seed))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level={level!r} is outside 0..1")


def documents_by_scaling(
    interval: tuple[float, float], estimate: float, margin: float, n_documents: int
) -> int | None:
    """Estimate how many more documents would bring the interval clear of the margin.

    This assumes that mean and spread stay the same, so the ends of the interval approach the
    estimate as 1/sqrt(n).

    Args:
        interval: confidence interval of the estimate.
        estimate: mean so far, in nats.
        margin: the predefined bound.
        n_documents: number of documents behind the interval.

    Returns:
        Zero if the interval is already clear of the margin; None if the number is unknown or above
        a million.
    """
    if interval[1] < margin or interval[0] > margin:
        return 0
    gap = abs(estimate - margin)
    reach = interval[1] - estimate if estimate < margin else estimate - interval[0]
    if gap == 0 or not math.isfinite(reach):
        return None
    total = n_documents * (reach / gap) ** 2
    return max(1, math.ceil(total) - n_documents) if total < 1_000_000 else None
