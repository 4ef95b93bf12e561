"""From the numbers of a map to an answer, by thresholds set in advance.

A cosine of non-negative gains alone proves nothing: E[cos] ≈ 1/(1 + CV²) for unrelated layers. A
correlation of gains that follow the same curve over frequency proves nothing either. The effect
size used here is the mean correlation between layers of their log gains minus that curve
(``frequency_profile``), with a jackknife interval over layers. The evidence is its permutation
p-value. Verdicts on sharing are derived from the answer, so the two always agree.
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
ALPHA_UNITS = 0.005
"""False-discovery rate at which a single unit is enough to conclude that something is shared."""
TRIVIAL = 0.1
"""A mean correlation below this counts as no sharing, however significant."""
UNIVERSAL = 0.5
"""Above this, most of the variation between units is common to all layers."""
MIN_LAYERS = 4
"""With fewer living layers, the spread between layers cannot be estimated."""
MIN_FREEDOM = 4
"""With fewer residual dimensions than this there is too little to compare: a rotary model needs
eight pairs per head."""
COSINE = 0.99

Answer = Literal[
    "universal",
    "partly shared",
    "not shared",
    "too few layers to say",
    "too few units to say",
    "not comparable",
]
Level = Literal["layer", "head"]
LEVELS: tuple[Level, ...] = ("layer", "head")


def jackknife(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval for the mean over pairs of a symmetric matrix of values in -1 … 1.

    Rows are treated as independent.

    Args:
        values: ``[row, row]``; the diagonal is ignored.
        level: confidence level.

    Returns:
        (low, high), within -1 … 1; the whole range with fewer than three rows.
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


def answer(cmap: CoordinateMap, level: Level = "layer") -> Answer:
    """Is the set of loud units universal, partly shared or not shared?

    Args:
        cmap: the map.
        level: ``layer`` compares layers by the mean of their heads, ``head`` every head with
            every head of the other layers.

    Returns:
        ``universal``: the null is rejected at ``ALPHA`` and the interval of the mean correlation
        of residuals is above ``UNIVERSAL``. ``partly shared``: it is rejected and the correlation
        is at least ``TRIVIAL``, or a single unit is universal at a false-discovery rate of
        ``ALPHA_UNITS``. ``not shared``: neither. ``too few layers to say`` below ``MIN_LAYERS``,
        ``too few units to say`` if the profile leaves fewer than ``MIN_FREEDOM`` dimensions,
        ``not comparable`` if index i has no common meaning across heads.
    """
    if not cmap.aligned:
        return "not comparable"
    if len(cmap.alive) < MIN_LAYERS:
        return "too few layers to say"
    if cmap.facts["freedom"] < MIN_FREEDOM:
        return "too few units to say"
    beaten = cmap.tests[cmap.null][level].p_mean <= ALPHA
    effect, (low, _) = cmap.correlation(level)
    if beaten and low > UNIVERSAL:
        return "universal"
    found = cmap.universal if level == "layer" else cmap.universal_by_head
    certain = bool((found.is_universal & (found.q_values <= ALPHA_UNITS)).any())
    return "partly shared" if certain or (beaten and effect >= TRIVIAL) else "not shared"


STATUS: dict[Answer, Status] = {
    "universal": "holds",
    "partly shared": "holds",
    "not shared": "fails",
}
"""Status of the claim that layers share units, by answer; undecided for the other answers."""
STATUS_SHARED = ("universal", "partly shared")


def evidence_line(cmap: CoordinateMap) -> str:
    """One line: the residual correlation with its null, and the cosine with its CV."""
    s = cmap.summary()
    low, high = cmap.effect_interval
    beyond = " beyond frequency" if cmap.null == "frequency" else ""
    line = (
        f"correlation{beyond} {s['residual_correlation']:.3f} [{low:.3f}, {high:.3f}] "
        f"(p = {s['p']:.2g}), head by head {s['residual_correlation_heads']:.3f} "
        f"(p = {s['p_heads']:.2g}); cosine {s['cosine']:.3f} at CV {s['cv']:.2f}, "
        f"null {s['null_cosine']:.3f}"
    )
    if "null_cosine_frequency" in s:
        line += f", null that keeps the frequency profile {s['null_cosine_frequency']:.3f}"
    return f"{line}, centred {s['centred_cosine']:.3f}"


def check_threshold(threshold: float) -> None:
    """Reject a threshold that no correlation, cosine or share can exceed, or that all exceed.

    Raises:
        InputError: the threshold is 0 or below, or 1 or above.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold={threshold!r} is outside 0..1: expected between the two")


def sharing_verdict(
    cmap: CoordinateMap, threshold: float | None = None, level: Level = "layer"
) -> Verdict:
    """ "Layers share units beyond frequency", following ``answer``, or with a threshold.

    With a threshold, the claim is that the mean correlation exceeds it. It holds if the interval is
    above it and the answer does not rule out sharing, and fails if the interval is below it.
    """
    given = answer(cmap, level)
    estimate, (low, high) = cmap.correlation(level)
    who = "layers share units" if level == "layer" else "heads of different layers share units"
    claim = who + (" beyond frequency" if cmap.null == "frequency" else "")
    status: Status = STATUS.get(given, "undecided")
    if threshold is not None:
        check_threshold(threshold)
        claim += f" (correlation above {threshold:g})"
        if status == "holds" and low <= threshold:
            status = "fails" if high < threshold else "undecided"
        elif status == "fails" and high >= threshold:
            status = "undecided"
    found = cmap.universal if level == "layer" else cmap.universal_by_head
    return Verdict(
        status,
        claim,
        estimate,
        (low, high),
        TRIVIAL if threshold is None else threshold,
        cmap.n_documents,
        f"{given}; {evidence_line(cmap)}; {len(found.units) if given in STATUS else 0} of "
        f"{len(cmap.units)} {cmap.units.kind}s universal; {cmap.facts['alignment']}; interval: "
        "jackknife over layers",
    )


def cosine_verdict(cmap: CoordinateMap, threshold: float) -> Verdict:
    """ "The cosine between layers is above ``threshold``: one coordinate system".

    It holds if the interval of the mean cosine is above the threshold **and** ``answer`` is
    universal. It fails if the cosine is below, or if it is above but the layers have little in
    common (the interval of the residual correlation ends below ``UNIVERSAL``). In the second case
    the cosine shows that gains are flat, not that layers agree.
    """
    check_threshold(threshold)
    given = answer(cmap)
    low, high = jackknife(cmap.cosine[np.ix_(cmap.alive, cmap.alive)])
    status: Status = "undecided"
    if given in STATUS:
        if high < threshold or (low > threshold and cmap.effect_interval[1] < UNIVERSAL):
            status = "fails"
        elif low > threshold and given == "universal":
            status = "holds"
    return Verdict(
        status,
        f"all layers share one coordinate system (cosine above {threshold:g})",
        cmap.summary()["cosine"],
        (low, high),
        threshold,
        cmap.n_documents,
        f"{given}; {evidence_line(cmap)}; {cmap.facts['alignment']}; intervals: jackknife over "
        "layers",
    )


def sinks_verdict(cmap: CoordinateMap, threshold: float | None) -> Verdict:
    """ "A sink dimension is a sink at every depth"; needs the map's ``sinks``."""
    if cmap.sinks is None:
        raise InputError(
            "this map has no sinks yet: with_evidence(model, …) or find_sinks(…) adds them"
        )
    verdict: Verdict = cmap.sinks.verdict() if threshold is None else cmap.sinks.verdict(threshold)
    return verdict


def sharing_cost_verdict(cmap: CoordinateMap, threshold: float | None) -> Verdict:
    """ "Sharing one index set costs less than ``threshold`` nats"; needs ``sharing_cost``."""
    if cmap.sharing_cost is None:
        raise InputError(
            "this map has no sharing_cost yet: with_evidence(model, …) or "
            "cost_of_sharing(…) adds it"
        )
    cost = cmap.sharing_cost
    verdict: Verdict = cost.verdict() if threshold is None else cost.verdict(threshold)
    return verdict


CLAIMS: dict[str, Any] = {
    "shared": sharing_verdict,
    "shared by heads": lambda cmap, t: sharing_verdict(cmap, t, "head"),
    "cosine": lambda cmap, t: cosine_verdict(cmap, COSINE if t is None else t),
    "sinks": sinks_verdict,
    "sharing cost": sharing_cost_verdict,
}
