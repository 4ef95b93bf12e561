"""A drawing of one claim in every report: estimates, intervals and the bound, as inline SVG.

Drawn by hand rather than by matplotlib: text stays text, and the colours follow the page's scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gainlens.report.compare_tables import Named, claims_of

LEFT, WIDTH, ROW, TOP = 170, 640, 30, 14
TICKS = 5


@dataclass(frozen=True)
class IntervalFigure:
    """What the template draws; all lengths are in user units of the SVG.

    Attributes:
        alt: the same numbers in words.
        height: of the drawing; its width is ``WIDTH``.
        rows: label, status, y, and x of the estimate and of both ends.
        ticks: x and label of each tick of the axis.
        margin: x of the bound, or None where no bound can be drawn.
    """

    alt: str
    height: int
    rows: Sequence[tuple[str, str, float, float, float, float]]
    ticks: Sequence[tuple[float, str]]
    margin: float | None


def interval_figure(quote: str, reports: Named) -> IntervalFigure | None:
    """The figure of one claim; None if no report has a number for it."""
    found: list[tuple[str, str, float, float, float]] = []
    margins = set()
    for label, facts in reports:
        claim = claims_of(facts).get(quote)
        if claim is None:
            continue
        verdict = claim["verdict"]
        values = [verdict.get("estimate"), *(verdict.get("interval") or (None, None))]
        numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
        if len(numbers) < 3:
            continue
        mean, first, last = numbers
        found.append((label, str(claim["status"]), mean, first, last))
        if verdict.get("margin") is not None:
            margins.add(float(verdict["margin"]))
    if not found:
        return None
    ends = [value for row in found for value in row[2:]] + list(margins)
    low, high = min(0.0, *ends), max(ends)
    step = _step(high - low)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20), 1)

    rows = [
        (label, status.split(",")[0], TOP + ROW * (i + 0.5), x(mean), x(first), x(last))
        for i, (label, status, mean, first, last) in enumerate(found)
    ]
    count = round((high - low) / step)
    ticks = [(x(low + i * step), f"{low + i * step:.10g}") for i in range(count + 1)]
    words = "; ".join(
        f"{label} {mean:+.3f}, interval {first:+.3f} to {last:+.3f}, {status}"
        for label, status, mean, first, last in found
    )
    bound = f" The bound is {min(margins):g}." if len(margins) == 1 else ""
    margin = x(min(margins)) if len(margins) == 1 else None
    return IntervalFigure(
        f"{quote}: {words}.{bound}", TOP + ROW * len(rows) + 34, rows, ticks, margin
    )


def _step(span: float) -> float:
    """A round distance between ticks that gives about ``TICKS`` of them."""
    raw = max(span, 1e-9) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
