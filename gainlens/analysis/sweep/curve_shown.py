"""A curve in one line, and in a notebook: its figure and its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gainlens.plots.notebook import Display
from gainlens.stats.verdicts import MARGIN

if TYPE_CHECKING:
    from gainlens.analysis.sweep.curve import SurgeryCurve


def rises_line(curve: SurgeryCurve, most: int = 6) -> str:
    """The rise in nats at each point but the controls, the first few."""
    own = [i for i, p in enumerate(curve.points) if p.order in ("quietest", "given")]
    several = len({(p.score, p.scope) for p in curve.points if p.order == "quietest"}) > 1
    shown = []
    for i in own[:most]:
        p = curve.points[i]
        name = p.label or (f"{p.score} {p.scope}" if several else p.order)
        shown.append(f"{name} {p.fraction:.0%} {curve.deltas(i).mean():+.3f}")
    return (", ".join(shown) or "controls only") + (", …" if len(own) > most else "")


def curve_display(curve: SurgeryCurve) -> Display:
    """The figure with the usual margin, and the rows below it."""
    from gainlens.plots.markup.results import surgery_chart

    orders = ", ".join(dict.fromkeys(str(p.label or p.order) for p in curve.points))
    return Display(
        "Rise of the loss in nats per token against the share of key dimensions cut, with "
        f"95% intervals, for: {orders}; the dashed line is a margin of {MARGIN:g} nats.",
        lambda alt: surgery_chart(curve, MARGIN, alt),
        table=(
            ["cut", "share", "seed", "rise (nats)", "95% interval", f"margin {MARGIN:g}"],
            [shown_row(row) for row in curve.table()],
        ),
        options={"margin": MARGIN},
    )


def shown_row(row: dict[str, Any]) -> list[str]:
    """A row of ``table`` for a notebook; the last column says on which side of the margin it is."""
    low, high = row["interval"]
    side = "below" if high < MARGIN else "above" if low > MARGIN else "inside the interval"
    return [
        str(row["label"] or f"{row['order']}, {row['score']}, {row['scope']}"),
        f"{row['fraction']:.0%}",
        "" if row["seed"] is None else str(row["seed"]),
        f"{row['delta']:+.4f}",
        f"{low:+.4f} to {high:+.4f}",
        side,
    ]
