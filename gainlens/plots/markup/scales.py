"""Numbers to steps of a colour, to places on an axis, and to ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gainlens.plots.markup.colours import STEPS


@dataclass(frozen=True)
class ColourScale:
    """Which step of a colour scale a value has.

    The page's script has the same formula; a test in a browser compares them.

    Attributes:
        kind: ``diverging`` around ``middle``, or ``sequential`` from ``low`` to ``high``.
        low, high: values of the first and the last step; beyond them the colour stays.
        log: whether steps are equal in the logarithm.
        unit: what the number is, for the legend and for reading a value.
    """

    kind: Literal["diverging", "sequential"]
    low: float
    high: float
    log: bool = False
    unit: str = ""

    @classmethod
    def around_zero(cls, values: Iterable[float], unit: str, least: float = 1e-6) -> ColourScale:
        """Diverging and centred on zero, as wide as the largest finite value."""
        widest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
        end = _rounded_up(max(widest, least))
        return cls("diverging", -end, end, unit=unit)

    @classmethod
    def around_one(cls, factor: float, unit: str) -> ColourScale:
        """Diverging in the logarithm and centred on 1, from 1/factor to factor."""
        return cls("diverging", 1 / factor, factor, log=True, unit=unit)

    @classmethod
    def from_zero(cls, values: Iterable[float], unit: str, least: float = 1e-6) -> ColourScale:
        """Sequential, from zero to the largest finite value."""
        highest = max((v for v in values if math.isfinite(v)), default=0.0)
        return cls("sequential", 0.0, _rounded_up(max(highest, least)), unit=unit)

    @property
    def letter(self) -> str:
        """First letter of the classes of this scale."""
        return self.kind[0] if self.kind == "diverging" else "q"

    def step(self, value: float) -> int | None:
        """The step from 0 to ``STEPS``; None for a value that is not finite."""
        if not math.isfinite(value):
            return None
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(x, 1e-12)) for x in (value, low, high))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return math.floor(share * STEPS + 0.5)

    def ends(self) -> tuple[float, float, float]:
        """Values at the start, the middle and the end."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return self.low, middle, self.high

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the script."""
        return {**asdict(self), "letter": self.letter}


def _rounded_up(value: float) -> float:
    """The next number with two digits."""
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / power - 1e-9) * power:.3g}")


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within ``low`` to ``high``, at most ``most``."""
    span = max(high - low, 1e-12)
    for exponent in range(math.floor(math.log10(span)) - 2, math.floor(math.log10(span)) + 2):
        for digit in (1, 2, 2.5, 5):
            step = digit * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 <= most:
                return [round(i * step, 12) for i in range(first, last + 1)]
    return [low, high]


@dataclass(frozen=True)
class Axis:
    """Values to places; straight, or logarithmic outside of ``linear``.

    Attributes:
        low, high: values at both ends.
        start, end: their places in the drawing.
        linear: below this size the axis is straight; None for a straight axis throughout.
    """

    low: float
    high: float
    start: float
    end: float
    linear: float | None = None

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, x = (self._bent(v) for v in (self.low, self.high, value))
        return self.start + (x - low) / ((high - low) or 1.0) * (self.end - self.start)

    def _bent(self, value: float) -> float:
        if self.linear is None or abs(value) <= self.linear:
            return value if self.linear is None else value / self.linear
        return math.copysign(1 + math.log10(abs(value) / self.linear), value)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the axis."""
        if self.linear is None:
            return nice_ticks(self.low, self.high, most)
        powers = [self.linear * 10.0**i for i in range(6)]
        sizes = sorted({0.0, self.linear / 2, *powers, *(3 * p for p in powers)})
        both = sorted({*sizes, *(-s for s in sizes)})
        return [float(f"{t:.3g}") for t in both if self.low <= t <= self.high]


def number(value: float, digits: int = 3) -> str:
    """A number for a person: few digits, a real minus sign, thousands apart."""
    if not math.isfinite(value):
        return "–"
    shown = f"{value:.{digits}g}"
    if "e" in shown:
        shown = f"{value:,.0f}" if abs(value) >= 1 else f"{value:.1e}"
    elif abs(value) >= 1000:
        shown = f"{float(shown):,.0f}"
    return shown.replace("-", "−")


def some(n: int, most: int) -> Sequence[int]:
    """At most ``most`` indices below ``n``, evenly apart, from 0 on."""
    step = max(1, math.ceil(n / most))
    return [int(i) for i in np.arange(0, n, step)]
