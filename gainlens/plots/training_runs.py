"""Figure of a training run: the cost of a cut against the number of training tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gainlens.plots.axes import (
    BLUE,
    CYCLE,
    GREEN,
    MARKERS,
    ORANGE,
    VERMILION,
    new_axes,
    title,
)

LINES = (VERMILION, ORANGE, GREEN)
FAR = 8
"""A line higher than this multiple of the curve's maximum is listed in the legend but not drawn."""


def plot_training(
    curve: Sequence[Mapping[str, Any]],
    ax: Any | None = None,
    *,
    untrained: Mapping[str, float] | None = None,
    margin: float | None = None,
    label: str = "healed",
) -> Any:
    """Rise of the loss against training tokens, or the objective if no loss was monitored.

    Args:
        curve: rows of ``TrainingRun.curve``.
        ax: matplotlib axes to draw into; new ones by default.
        untrained: rises of cuts without training, in nats per token, drawn as lines.
        margin: drawn as a dashed line, in nats per token.
        label: label of the curve.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    rows = [row for row in curve if row.get("rise") is not None]
    if not rows:
        rows = [row for row in curve if row.get("loss") is not None]
        ax.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color=BLUE, label=label)
        ax.set_ylabel("training loss (nats per token)")
    else:
        tokens, rises = [row["tokens"] for row in rows], [row["rise"] for row in rows]
        known = [row for row in rows if row.get("interval") is not None]
        ax.fill_between(
            [row["tokens"] for row in known],
            [row["interval"][0] for row in known],
            [row["interval"][1] for row in known],
            color=CYCLE[0],
            alpha=0.2,
            linewidth=0,
            label="95% interval over documents",
        )
        ax.plot(tokens, rises, color=CYCLE[0], marker=MARKERS[0], markersize=4, label=label)
        ax.axhline(0.0, color="black", linewidth=1, label="intact model")
        top = max([*rises, *(row["interval"][1] for row in known), margin or 0.0])
        for (name, rise), colour in zip((untrained or {}).items(), LINES, strict=False):
            style: dict[str, Any] = {"color": colour, "linestyle": "-.", "linewidth": 1.2}
            if rise <= FAR * top:
                ax.axhline(rise, label=name, **style)
            else:  # would flatten the curve
                ax.plot([], [], label=f"{name}: {rise:+.2f}, far above", **style)
        if margin is not None:
            ax.axhline(margin, color="grey", linestyle="--", linewidth=1, label="margin")
        ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_xlabel("training tokens")
    ax.legend(fontsize=8)
    title(ax, "Loss against training tokens")
    return ax
