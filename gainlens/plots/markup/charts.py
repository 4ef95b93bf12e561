"""Line and bar charts as SVG; every mark says its value when pointed at, without a script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gainlens.plots.markup.marks import WIDTH, drawing, symbol, text
from gainlens.plots.markup.scales import Axis, number, some

LEFT, RIGHT, TOP, TALL = 58, 10, 10, 210


@dataclass(frozen=True)
class Series:
    """Values of one line, or of one kind of bar.

    Attributes:
        name: for the legend and for reading a value.
        values: one per place; NaN for none.
        intervals: low and high end per place, if known.
        at: numeric places along the axis; by default 0, 1, 2 …
    """

    name: str
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    at: Sequence[float] = field(default=())

    def place(self, index: int) -> float:
        """Where a value stands along the axis."""
        return float(self.at[index]) if self.at else float(index)

    def said(self, index: int, label: str, unit: str) -> str:
        """A value in words."""
        words = f"{self.name}, {label}: {number(self.values[index])} {unit}".rstrip()
        if self.intervals and all(map(math.isfinite, self.intervals[index])):
            low, high = self.intervals[index]
            words += f" [{number(low)} to {number(high)}]"
        return words


@dataclass(frozen=True)
class Frame:
    """What surrounds the values of a chart.

    Attributes:
        labels: of the places along the axis.
        across, up: what the two axes are.
        unit: of the values, for reading one.
        margin: drawn as a dashed line, if given.
        linear: see ``Axis``.
        title: above the chart.
        reach: further values that the axis must reach, to be like its neighbours'.
    """

    labels: Sequence[str]
    across: str
    up: str
    unit: str
    margin: float | None = None
    linear: float | None = None
    title: str = ""
    reach: Sequence[float] = ()


def line_chart(series: Sequence[Series], frame: Frame, alt: str) -> str:
    """Lines with intervals over the places."""
    places = [s.place(i) for s in series for i in range(len(s.values))]
    low, high = (min(places), max(places)) if places else (0.0, 1.0)
    room = max((high - low) * 0.06, 0.5 if low == high else 0.0)
    across = Axis(low - room, high + room, LEFT, WIDTH - RIGHT)
    up = _up(series, frame, zero=False)
    parts = _frame(frame, across, up, {s.place(i): i for s in series for i in range(len(s.values))})
    for which, line in enumerate(series):
        shift = 3.0 * (which - (len(series) - 1) / 2)
        points, marks, bars = [], [], []
        for i, value in enumerate(line.values):
            if not math.isfinite(value):
                continue
            x, y = across.at(line.place(i)) + shift, up.at(value)
            points.append(f"{x:.4g} {y:.4g}")
            marks.append(symbol(which, x, y, line.said(i, frame.labels[i], frame.unit)))
            bars.append(_whisker(line, i, x, up))
        name = f"s{which % 6}"
        path = f'<path class="line {name}" d="M{"L".join(points)}"/>' if len(points) > 1 else ""
        parts.append(f'{path}<path class="whisker {name}" d="{"".join(bars)}"/>{"".join(marks)}')
    return drawing("".join(parts), _height(frame), alt)


def bar_chart(series: Sequence[Series], frame: Frame, alt: str, *, together: bool = False) -> str:
    """Bars with intervals over the places.

    Args:
        series: one kind of bar each, side by side.
        frame: axes and labels.
        alt: the figure in words.
        together: bars of all series stand in the same place; each place has one value.
    """
    n = len(frame.labels)
    across = Axis(-0.5, n - 0.5, LEFT, WIDTH - RIGHT)
    up = _up(series, frame, zero=True)
    parts = _frame(frame, across, up, {float(i): i for i in range(n)})
    step = (WIDTH - RIGHT - LEFT) / max(1, n)
    wide = step * 0.8 / (1 if together else len(series))
    for which, kind in enumerate(series):
        for i, value in enumerate(kind.values):
            if not math.isfinite(value):
                continue
            shift = 0.0 if together else (which - (len(series) - 1) / 2) * wide
            x, zero, y = across.at(i) + shift, up.at(0), up.at(value)
            said = html.escape(kind.said(i, frame.labels[i], frame.unit))
            parts.append(
                f'<rect class="mark fill s{which % 6}" x="{x - wide / 2:.4g}" '
                f'y="{min(y, zero):.4g}" width="{wide:.4g}" '
                f'height="{max(abs(y - zero), 0.6):.4g}"><title>{said}</title></rect>'
            )
            if whisker := _whisker(kind, i, x, up):
                parts.append(f'<path class="whisker ink" d="{whisker}"/>')
    return drawing("".join(parts), _height(frame), alt)


def all_values(series: Sequence[Series]) -> list[float]:
    """Values and ends of intervals."""
    ends = [end for s in series for interval in s.intervals for end in interval]
    return [*(value for s in series for value in s.values), *ends]


def _up(series: Sequence[Series], frame: Frame, *, zero: bool) -> Axis:
    """The value axis, wide enough for all values, intervals, zero and the margin."""
    ends = [0.0, frame.margin or 0.0, *frame.reach, *all_values(series)]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = min(ends), max(ends)
    room = 0.06 * ((high - low) or 1.0)
    return Axis(
        low - (0.0 if zero and low == 0 else room), high + room, TOP + _top(frame) + TALL,
        TOP + _top(frame), frame.linear,
    )  # fmt: skip


def _top(frame: Frame) -> float:
    return 18.0 if frame.title else 0.0


def _height(frame: Frame) -> float:
    return TOP + _top(frame) + TALL + 44


def _frame(frame: Frame, across: Axis, up: Axis, places: dict[float, int]) -> list[str]:
    """Grid, ticks and names of both axes."""
    bottom, right = up.start, WIDTH - RIGHT
    parts = [text(LEFT, TOP + 8, frame.title, "strong")] if frame.title else []
    last = math.inf
    for tick in up.ticks():
        y = up.at(tick)
        if last - y < 14:
            continue
        last = y
        parts.append(f'<path class="grid" d="M{LEFT} {y:.4g}H{right}"/>')
        parts.append(text(LEFT - 6, y + 4, number(tick), "end"))
    parts.append(f'<path class="zero" d="M{LEFT} {up.at(0):.4g}H{right}"/>')
    if frame.margin is not None:
        parts.append(f'<path class="margin" d="M{LEFT} {up.at(frame.margin):.4g}H{right}"/>')
    inner = right - LEFT
    longest = max((len(label) for label in frame.labels), default=1)
    most = max(2, int(inner // max(24, 8 * longest)))
    for i in some(len(places), most):
        place = sorted(places)[i]
        label = frame.labels[places[place]]
        x = across.at(place)
        if x + 4 * len(label) > WIDTH:  # it would run off the drawing
            parts.append(text(WIDTH - 1, bottom + 16, label, "end"))
        else:
            parts.append(text(x, bottom + 16, label, "mid"))
    parts.append(text(LEFT + inner / 2, bottom + 36, frame.across, "mid name"))
    middle = (up.start + up.end) / 2
    turned = f' transform="rotate(-90 12 {middle:g})"'
    parts.append(text(12, middle, frame.up, "mid name", turned))
    return parts


def _whisker(series: Series, index: int, x: float, up: Axis) -> str:
    if not series.intervals or not all(map(math.isfinite, series.intervals[index])):
        return ""
    low, high = (up.at(end) for end in series.intervals[index])
    return f"M{x - 3:.4g} {low:.4g}h6m-3 0V{high:.4g}m-3 0h6"
