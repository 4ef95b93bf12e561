"""A heat map as SVG: one path per colour, so that thousands of cells stay small."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gainlens.plots.markup.colours import STEPS
from gainlens.plots.markup.marks import WIDTH, drawing, text
from gainlens.plots.markup.scales import ColourScale, number, some

LEFT, RIGHT, TOP = 46, 8, 8
TALLEST, LOWEST = 300, 6
"""Limits of the height of the cells together, and of one cell."""


def heat_map(
    values: Float[np.ndarray, "row column"],
    scale: ColourScale,
    rows: Sequence[str],
    columns: Sequence[str],
    row_name: str,
    column_name: str,
    alt: str,
    *,
    said: bool = False,
) -> str:
    """The drawing.

    Args:
        values: a number per cell; NaN stays empty.
        scale: which colour a number has.
        rows, columns: their labels.
        row_name, column_name: what they are, for the axes.
        alt: the figure in words.
        said: each cell says its value when pointed at, without a script; some 70 bytes a cell.
    """
    n, m = values.shape
    wide = WIDTH - LEFT - RIGHT
    cell_w, cell_h = wide / m, max(LOWEST, min(28, TALLEST / n))
    tall = n * cell_h
    bottom = TOP + tall
    placed = f'transform="translate({LEFT} {TOP}) scale({cell_w:.5g} {cell_h:.5g})"'
    parts = [
        f'<g class="cells" {placed}>'
        f'<rect class="ground" width="{m}" height="{n}"/>{cells(values, scale)}</g>'
    ]
    if said:
        words = [f"{row_name} {row}, {column_name} {{}}: " for row in rows]
        parts.append(f'<g class="values" {placed}>{_values(values, words, columns)}</g>')
    for r in some(n, max(2, int(tall // 18))):
        middle = TOP + (r + 0.5) * cell_h + 4
        parts.append(text(LEFT - 6, middle, rows[r], "end"))
    longest = max(len(label) for label in columns)
    for c in some(m, max(2, int(wide // max(26, 8 * longest)))):
        parts.append(text(LEFT + (c + 0.5) * cell_w, bottom + 16, columns[c], "mid"))
    parts.append(text(LEFT + wide / 2, bottom + 34, column_name, "mid name"))
    middle = TOP + tall / 2
    turned = f' transform="rotate(-90 12 {middle:g})"'
    parts.append(text(12, middle, row_name, "mid name", turned))
    parts.append(_colours(scale, bottom + 46))
    return drawing("".join(parts), bottom + 96, alt)


def cells(values: Float[np.ndarray, "row column"], scale: ColourScale) -> str:
    """One path per step of the scale; neighbours in a row that share a step are one rectangle."""
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(values.tolist()):
        steps = [scale.step(value) for value in row]
        c = 0
        while c < len(steps):
            end = c + 1
            while end < len(steps) and steps[end] == steps[c]:
                end += 1
            step = steps[c]
            if step is not None:
                paths.setdefault(step, []).append(f"M{c} {r}h{end - c}v1h-{end - c}z")
            c = end
    return "".join(
        f'<path class="{scale.letter}{step}" d="{"".join(paths[step])}"/>' for step in sorted(paths)
    )


def _values(
    values: Float[np.ndarray, "row column"], words: Sequence[str], columns: Sequence[str]
) -> str:
    """An invisible cell per value with what it says; the style sheet makes it one unit large."""
    lines = []
    for r, row in enumerate(values.tolist()):
        said = (html.escape(words[r].format(columns[c]) + number(v)) for c, v in enumerate(row))
        cells = "".join(f'<rect x="{c}"><title>{s}</title></rect>' for c, s in enumerate(said))
        lines.append(f'<g transform="translate(0 {r})">{cells}</g>')
    return "".join(lines)


def _colours(scale: ColourScale, y: float) -> str:
    """The bar of colours, with its values and what they are."""
    wide = WIDTH - LEFT - RIGHT
    step = wide / (STEPS + 1)
    bar = "".join(
        f'<path class="{scale.letter}{i}" '
        f'd="M{LEFT + i * step:.5g} {y:g}h{step:.5g}v8h-{step:.5g}z"/>'
        for i in range(STEPS + 1)
    )
    low, middle, high = (number(v) for v in scale.ends())
    return (
        f'<g class="bar">{bar}</g>'
        + text(LEFT, y + 22, low)
        + text(LEFT + wide / 2, y + 22, middle, "mid")
        + text(LEFT + wide, y + 22, high, "end")
        + text(LEFT + wide / 2, y + 40, scale.unit, "mid name")
    )
