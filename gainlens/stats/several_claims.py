"""Several claims judged on one text: Holm's correction, so that any false word stays rare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gainlens.errors import InputError
from gainlens.stats.intervals import bootstrap_chances
from gainlens.stats.verdicts import LEVEL, Verdict, judge, resamples_for


def judge_together(claims: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts on several claims on one text, corrected so that all of them may be quoted.

    The chance that any of them is called ``holds`` or ``fails`` falsely is that of a single one
    (Holm 1979, step-down, on the p-values that belong to the bootstrap-t interval). Each verdict's
    interval is the one that its step used, and its note says that it was corrected.

    Args:
        claims: the arguments of ``gainlens.stats.verdicts.judge`` by name: ``claim``,
            ``differences``, ``margin`` and, where wanted, ``groups``, ``domain``, ``context``,
            ``note``.

    Raises:
        InputError: no claim, or see ``judge``.

    Example:
        >>> rises = np.random.default_rng(0).normal(0.0, 0.01, (2, 80))
        >>> both = judge_together([
        ...     {"claim": f"cut {i}", "differences": rise, "margin": 0.02}
        ...     for i, rise in enumerate(rises)
        ... ])
        >>> [verdict.status for verdict in both]
        ['holds', 'holds']
    """
    if not claims:
        raise InputError("claims is empty: expected at least one")
    count = len(claims)
    if count == 1:
        return [judge(**claims[0])]
    error = 1 - LEVEL
    resamples = resamples_for(error / count)
    chances = [
        2
        * min(
            bootstrap_chances(
                c["differences"], c["margin"], groups=c.get("groups"), resamples=resamples
            )
        )
        for c in claims
    ]
    order = sorted(range(count), key=chances.__getitem__)
    verdicts: list[Verdict | None] = [None] * count
    left, going = count, True
    for index in order:
        verdict = judge(**{**claims[index], "level": 1 - error / left})
        said = f"corrected for {count} claims on this text (Holm)"
        note = f"{verdict.note}; {said}" if verdict.note else said
        verdicts[index] = replace(verdict, note=note)
        # Once a claim stays open, those less clear are held to the same level.
        low, high = verdict.interval
        going = going and (high < verdict.margin or low > verdict.margin)
        left = max(1, left - going)
    return [verdict for verdict in verdicts if verdict is not None]
