"""From the numbers of a map to an answer, by bounds set beforehand.

A bare cosine of non-negative gains proves nothing: E[cos] ≈ 1/(1 + CV²) for unrelated layers. The
effect size used here is the mean centred cosine between layers (a correlation: the share of the
variation between units that layers have in common), with a jackknife interval over layers. The
evidence is its permutation p-value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats

from gainlens.errors import InputError
from gainlens.stats.verdicts import Status, Verdict

if TYPE_CHECKING:
    from gainlens.analysis.map.coordinates import CoordinateMap

ALPHA = 0.01
"""Level of the test that anything is shared."""
TRIVIAL = 0.1
"""A mean correlation below this is called nothing, however significant."""
UNIVERSAL = 0.5
"""From here on the larger part of the variation between units is common to all layers."""

Answer = Literal["universal", "partly shared", "not shared"]


def jackknife(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval for the mean over pairs of a symmetric matrix of values in -1 … 1.

    Rows are the independent things.

    Args:
        values: ``[row, row]``; the diagonal is ignored.
        level: coverage.

    Returns:
        (low, high), within -1 … 1; all of that with fewer than three rows.
    """
    n = len(values)
    if n < 3:
        return -1.0, 1.0
    total = np.triu(values, 1).sum()
    rows = values.sum(1) - np.diag(values)
    without = (total - rows) / ((n - 1) * (n - 2) / 2)
    mean = total / (n * (n - 1) / 2)
    spread = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * spread)
    return max(-1.0, float(mean - half)), min(1.0, float(mean + half))


def answer(cmap: CoordinateMap) -> Answer:
    """Is the set of loud units universal, partly shared or not shared?

    ``not shared``: the mean centred cosine does not beat its plain null at ``ALPHA`` or is below
    ``TRIVIAL``, and no single unit is universal at a false-discovery rate of ``ALPHA``.
    ``universal``: the null is beaten and the interval of the mean centred cosine is above
    ``UNIVERSAL``.
    """
    beaten = cmap.tests["plain"]["centred"].p_mean <= ALPHA
    if beaten and cmap.effect_interval[0] > UNIVERSAL:
        return "universal"
    certain = cmap.universal.is_universal["plain"] & (cmap.universal.q_values["plain"] <= ALPHA)
    shared = (beaten and cmap.effect >= TRIVIAL) or bool(certain.any())
    return "partly shared" if shared else "not shared"


def evidence_line(cmap: CoordinateMap) -> str:
    """Cosine, CV, centred cosine and every null, in one line."""
    s = cmap.summary()
    line = (
        f"cosine {s['cosine']:.3f} at CV {s['cv']:.2f}; null {s['null_cosine']:.3f} "
        f"(p = {s['p_plain']:.2g})"
    )
    if "null_cosine_band" in s:
        line += (
            f", null that keeps the rotary frequency profile {s['null_cosine_band']:.3f} "
            f"(p = {s['p_band']:.2g})"
        )
    low, high = cmap.effect_interval
    return f"{line}; centred {s['centred_cosine']:.3f} [{low:.3f}, {high:.3f}]"


def cosine_verdict(cmap: CoordinateMap, threshold: float) -> Verdict:
    """ "The cosine between layers is above ``threshold``: one coordinate system".

    Holds when the interval of the mean cosine is above the threshold **and** the map is
    universal by ``answer``. Fails when the cosine is below, or when it is above but what the
    layers have in common is shown to be small (the interval of the centred cosine ends below
    ``UNIVERSAL``): then the cosine says that gains are flat, not that layers agree.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold={threshold!r} is outside 0..1")
    alive = np.ix_(cmap.alive, cmap.alive)
    low, high = jackknife(cmap.cosine[alive])
    mean = cmap.summary()["cosine"]
    status: Status
    if not cmap.aligned:
        status = "undecided"
    elif high < threshold or (len(cmap.alive) < 3 and mean < threshold):
        status = "fails"
    elif low > threshold and answer(cmap) == "universal":
        status = "holds"
    elif low > threshold and cmap.effect_interval[1] < UNIVERSAL:
        status = "fails"
    else:
        status = "undecided"
    return Verdict(
        status,
        f"all layers share one coordinate system (cosine above {threshold:g})",
        mean,
        (low, high),
        threshold,
        cmap.n_documents,
        f"{evidence_line(cmap)}; {cmap.facts['alignment']}; intervals: jackknife over layers",
    )


def sharing_verdict(cmap: CoordinateMap, threshold: float = UNIVERSAL) -> Verdict:
    """ "Layers use the same units": the centred cosine against ``threshold``, and its null."""
    low, high = cmap.effect_interval
    null_beaten = cmap.tests["plain"]["centred"].p_mean <= ALPHA
    status: Status = "undecided"
    if cmap.aligned:
        if low > threshold and null_beaten:
            status = "holds"
        elif high < threshold:
            status = "fails"
    return Verdict(
        status,
        f"layers use the same units (centred cosine above {threshold:g})",
        cmap.effect,
        (low, high),
        threshold,
        cmap.n_documents,
        f"{answer(cmap)}; {evidence_line(cmap)}; {len(cmap.universal_units)} of "
        f"{len(cmap.units)} units universal",
    )


def sinks_verdict(cmap: CoordinateMap) -> Verdict:
    """ "A sink dimension is a sink at every depth"; needs the map's ``sinks``."""
    if cmap.sinks is None:
        raise InputError(
            "this map has no sinks yet: with_evidence(cmap, model, …) or find_sinks(…) adds them"
        )
    verdict: Verdict = cmap.sinks.verdict()
    return verdict


def price_verdict(cmap: CoordinateMap, threshold: float | None) -> Verdict:
    """ "Sharing one index set costs less than ``threshold`` nats"; needs the map's ``price``."""
    if cmap.price is None:
        raise InputError(
            "this map has no price yet: with_evidence(cmap, model, …) or "
            "price_of_universality(…) adds it"
        )
    verdict: Verdict = cmap.price.verdict(margin=threshold or 0.05)
    return verdict


CLAIMS: dict[str, Any] = {
    "cosine": lambda cmap, t: cosine_verdict(cmap, 0.99 if t is None else t),
    "shared": lambda cmap, t: sharing_verdict(cmap, UNIVERSAL if t is None else t),
    "sinks": lambda cmap, t: sinks_verdict(cmap),
    "price": price_verdict,
}
