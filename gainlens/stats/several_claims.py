"""Several claims judged on one text, with Holm's correction for multiple testing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gainlens.errors import InputError
from gainlens.stats.intervals import bootstrap_chances
from gainlens.stats.verdicts import LEVEL, Verdict, judge, resamples_for


def judge_together(claims: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts on several claims on one text, corrected so that all of them can be quoted.

    The probability that any of them is falsely called ``holds`` or ``fails`` is that of a single
    claim (Holm 1979, step-down, on the p-values of the bootstrap-t interval). Each verdict has the
    interval used in its step and a note about the correction.

    Args:
        claims: the arguments of ``gainlens.stats.verdicts.judge`` by name: ``claim``,
            ``differences``, ``margin`` and optionally ``groups``, ``domain``, ``context``,
            ``note``.

    Raises:
        InputError: there is no claim; or as for ``judge``.

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
        # Once a claim is undecided, all less clear ones are judged at the same level.
        low, high = verdict.interval
        going = going and (high < verdict.margin or low > verdict.margin)
        left = max(1, left - going)
    return [verdict for verdict in verdicts if verdict is not None]
