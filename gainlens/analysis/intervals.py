"""Confidence intervals for the mean over documents. Documents, not tokens, are independent."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy import stats

from gainlens.errors import InputError


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
    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * float(spread)
    mean = float(values.mean())
    return mean - half, mean + half
