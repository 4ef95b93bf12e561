"""Heat maps of the page: layers down, a number per column, key heads of a layer on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.plots.markup.heat_map import heat_map
from gainlens.plots.markup.scales import ColourScale
from gainlens.report.page import PageFigure, View, csv_of

MOST = 70_000
"""Numbers in a figure, at most, some 7 bytes each. Beyond, single heads are left out, except in the
first view, then also there, then the last views: a page has some seven heat maps and 3 MB."""


@dataclass(frozen=True, eq=False)
class HeatView:
    """The numbers of one choice.

    Attributes:
        choice: one value per choice of the figure.
        scale: which colour a number has.
        values: ``[layer, column]``.
        parts: ``[layer, part, column]``, e.g. by key head; None if there are none.
    """

    choice: tuple[str, ...]
    scale: ColourScale
    values: Float[np.ndarray, "layer column"]
    parts: Float[np.ndarray, "layer part column"] | None = None

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return self.values.size + (0 if self.parts is None else self.parts.size)


@dataclass(frozen=True)
class HeatAxes:
    """What the axes are.

    Attributes:
        rows, columns: labels.
        row, column, part: what a row, a column and a part of a row are called.
        notes: more about each column, for reading a value; empty for none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    row: str = "layer"
    column: str = "key dimension"
    part: str = "key head"
    notes: Sequence[str] = ()


def heat_figure(
    name: str,
    views: Sequence[HeatView],
    axes: HeatAxes,
    *,
    alt: str,
    caption: str,
    python: str,
    choices: Sequence[str] = (),
) -> PageFigure:
    """A heat map whose further views, and heads of a layer, the page's script draws from the data.

    Args:
        name: of the figure.
        views: the first is drawn here, and is all that is seen without a script.
        axes: labels of rows and columns.
        alt, caption, python: see ``PageFigure``.
        choices: names of what the views' ``choice`` gives values for.
    """
    views = _within_bounds(views)
    split = any(view.parts is not None for view in views)
    head = [*choices, axes.row, *([axes.part] if split else []), *axes.columns]
    first = views[0]
    config: dict[str, Any] = {
        "choices": len(choices),
        "split": split,
        "row": axes.row,
        "column": axes.column,
        "part": axes.part,
        "notes": list(axes.notes),
        "scales": {"|".join(view.choice): view.scale.to_json() for view in views},
    }
    drawn = heat_map(
        np.vectorize(_rounded, otypes=[float])(first.values), first.scale, axes.rows,
        axes.columns, axes.row, axes.column, alt,
    )  # fmt: skip
    return PageFigure(
        name,
        alt,
        caption + (f" Choose a {axes.row} to see its {axes.part}s." if split else ""),
        (View(first.choice, drawn),),
        {c: list(dict.fromkeys(v.choice[i] for v in views)) for i, c in enumerate(choices)},
        csv_of(head, _rows(views, axes, split)),
        python,
        config,
    )


def _rows(views: Sequence[HeatView], axes: HeatAxes, split: bool) -> list[list[object]]:
    found: list[list[object]] = []
    for view in views:
        for r, row in enumerate(axes.rows):
            start = [*view.choice, row]
            found.append([*start, *(["all"] if split else []), *view.values[r].tolist()])
            if view.parts is not None:
                found += [[*start, str(p), *part.tolist()] for p, part in enumerate(view.parts[r])]
    return found


def _within_bounds(views: Sequence[HeatView]) -> list[HeatView]:
    """All of it, or without single heads except in the first view, or the first views only."""
    plain = [HeatView(v.choice, v.scale, v.values) for v in views]
    for kept in (list(views), [views[0], *plain[1:]]):
        if sum(view.size for view in kept) <= MOST:
            return kept
    sizes = accumulate(view.size for view in plain)
    return plain[: max(1, sum(size <= MOST for size in sizes))]


def _rounded(value: float) -> float:
    """As in the data, so that drawing from the data gives the same colours."""
    return float(f"{value:.4g}")
