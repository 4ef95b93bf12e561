"""``Verdict``: what a claim comes to, with the number and the interval that decide it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gainlens.errors import InputError
from gainlens.frames import data_frame

Status = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of testing one claim.

    Attributes:
        status: ``holds``, ``fails`` or ``undecided``.
        claim: the claim in words.
        estimate: the number that decides it, in the units that the claim names.
        interval: its confidence interval.
        margin: the bound set beforehand.
        n_documents: how many independent documents it rests on.
        note: anything that a reader must know besides.
        more_documents: how many more would decide it if mean and spread stay what they are; 0
            when decided, None when that can't be said.
    """

    status: Status
    claim: str
    estimate: float
    interval: tuple[float, float]
    margin: float
    n_documents: int
    note: str = ""
    more_documents: int | None = None

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Verdict({self.status}: {self.claim}; {self.estimate:.4g} [{low:.4g}, {high:.4g}] "
            f"against {self.margin:.4g}, {self.n_documents} documents)"
        )

    def to_dataframe(self) -> Any:
        """One row: status, claim, estimate, low, high, margin, n_documents, note, more_documents.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame([asdict(self)])

    def plot(self, ax: Any = None) -> Any:
        """The interval beside the margin; returns the matplotlib axes, shows nothing."""
        from gainlens.plots.basics import plot_verdict

        return plot_verdict(self, ax)

    def _repr_html_(self) -> str:
        from gainlens.plots.notebook import figure_html

        low, high = self.interval
        return figure_html(
            self,
            f"The claim {self.status}: estimate {self.estimate:.4g} with interval {low:.4g} to "
            f"{high:.4g}, beside the margin {self.margin:.4g}.",
            size=(7, 1.9),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        plain = {**asdict(self), "interval": list(self.interval)}
        for key in ("estimate", "margin"):
            plain[key] = _finite(plain[key])
        plain["interval"] = [_finite(bound) for bound in self.interval]
        return plain


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def non_inferiority(
    claim: str,
    estimate: float,
    interval: tuple[float, float],
    margin: float,
    n_documents: int,
    note: str = "",
    more_documents: int | None = None,
) -> Verdict:
    """Damage below ``margin``: holds if the whole interval is below it, fails if it is above.

    Raises:
        InputError: a margin of zero or below: absence of any damage can't be shown.
    """
    if not margin > 0:
        raise InputError(f"margin={margin!r} is not above 0: no finite text can show zero damage")
    low, high = interval
    status: Status = "holds" if high < margin else "fails" if low > margin else "undecided"
    return Verdict(status, claim, estimate, interval, margin, n_documents, note, more_documents)
