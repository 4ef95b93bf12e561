"""Shared parts of all figures: axes, colour-blind-safe colours, whole-number ticks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe and Ito's palette.
BLUE, ORANGE, VERMILION, GREEN, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
)
CYCLE = (BLUE, GREEN, PURPLE, SKY, VERMILION, ORANGE)
MARKERS = ("o", "D", "v", "P", "X", "s")
STATUS_COLOURS = {
    "holds": GREEN,
    "holds, except for harms in fewer than one document in ten": SKY,
    "fails": VERMILION,
    "undecided": PURPLE,
}

LETTERS_PER_INCH = 9.5
"""Maximum characters of a title per inch, with some margin for axes that are off-centre."""

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"


def new_axes(ax: Any | None, size: tuple[float, float] = (7, 4)) -> Any:
    """The caller's axes, or those of a new pyplot figure, which notebooks display automatically."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def new_panels(axes: Any | None, rows: int, columns: int, size: tuple[float, float]) -> Any:
    """The caller's axes as a flat array, or those of a new figure."""
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    return np.atleast_1d(np.asarray(axes, dtype=object)).ravel()


def title(ax: Any, text: str, pad: float | None = None) -> None:
    """Set a title, wrapped to fit the width of its axes."""
    place = ax.get_subplotspec()
    columns = 1 if place is None else place.get_gridspec().ncols
    letters = LETTERS_PER_INCH * ax.figure.get_figwidth() / columns
    ax.set_title(textwrap.fill(text, int(min(64, max(16, letters)))), fontsize=10, pad=pad)


def whole_numbers(ax: Any, *which: str) -> Any:
    """Use whole-number ticks on the given axes (``x``, ``y``), e.g. for layers."""
    from matplotlib.ticker import MaxNLocator

    for name in which:
        getattr(ax, f"{name}axis").set_major_locator(MaxNLocator(integer=True))
    return ax


def reach(values: Any) -> float:
    """The limit of a diverging colour map centred on zero."""
    finite = np.abs(np.asarray(values, dtype=np.float64))
    finite = finite[np.isfinite(finite)]
    return max(float(finite.max()) if finite.size else 0.0, 1e-12)


def colour_bar(ax: Any, image: Any, label: str) -> Any:
    """A colour bar with its label."""
    return ax.figure.colorbar(image, ax=ax, label=label)


def readable_on(image: Any, value: float) -> str:
    """Black or white, whichever is readable on the colour of ``value`` in ``image``."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def some(n: int, most: int) -> Sequence[int]:
    """At most ``most`` evenly spaced indices below ``n``, including both ends."""
    picked: list[int] = np.unique(np.linspace(0, n - 1, most).astype(int)).tolist()
    return picked
