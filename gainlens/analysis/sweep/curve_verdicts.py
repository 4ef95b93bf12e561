"""Claims about the points of a sweep: each text by itself, several claims corrected together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from gainlens.errors import InputError
from gainlens.stats.by_domain import judge_claims
from gainlens.stats.verdicts import Context, Verdict

if TYPE_CHECKING:
    from gainlens.analysis.sweep.curve import SurgeryCurve


def curve_verdicts(
    curve: SurgeryCurve, claims: Sequence[tuple[int, float]]
) -> list[dict[str, Verdict]]:
    """For each claim its verdicts by name of the text; of all texts if points may stop early.

    Args:
        curve: a sweep.
        claims: index of a point, and the margin in nats per token. Several are corrected (Holm),
            since they are judged on the same documents, unless points may stop early: there each
            spends its own error over the looks.

    Raises:
        InputError: a margin that is not a number above 0.
    """
    asked = [_claim(curve, index, margin) for index, margin in claims]
    if curve.stopping is not None:
        return [
            _stopped(curve, index, claim) for (index, _), claim in zip(claims, asked, strict=True)
        ]
    return judge_claims(
        asked,
        domains=curve.domains,
        lengths=curve.lengths,
        groups=curve.groups or None,
    )


def _claim(curve: SurgeryCurve, index: int, margin: float) -> dict[str, Any]:
    if not isinstance(margin, Real) or not margin > 0 or not math.isfinite(margin):
        raise InputError(
            f"margin={margin!r} is not a number above 0: no finite text can show zero damage"
        )
    point = curve.points[index]
    made = ", ".join(
        str(v) for v in (point.label, point.score, point.scope, point.unit, point.mode) if v
    )
    kind = "" if point.order in ("quietest", "given") else f"{point.order} "
    claim = (
        f"{point.fraction:.0%} of the {kind}key dimensions can be cut ({made}) at less than "
        f"{margin:g} nats"
    )
    return {"claim": claim, "differences": curve.deltas(index), "margin": margin}


def _stopped(curve: SurgeryCurve, index: int, claim: dict[str, Any]) -> dict[str, Verdict]:
    """The verdict on a point that ran until it was decided, on the documents that it saw."""
    assert curve.stopping is not None
    run = len(claim["differences"])
    names = tuple(dict.fromkeys(curve.domains[:run]))
    found = curve.stopping.judge(
        **claim,
        early=run < curve.n_documents,
        groups=curve.groups[:run] or None,
        domain=names,
        context=Context.of(curve.lengths[:run]) if curve.lengths else None,
    )
    return {", ".join(names): found}
