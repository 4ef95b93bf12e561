"""The notebook display of a result: its ``repr``, and its figure with alternative text.

A notebook that takes HTML gets inline SVG, whose marks say their values when pointed at, without a
script. One that does not, such as a console or a PDF, gets the same figure as PNG. The PNG also
stands in for a drawing above ``LARGEST``. It is drawn outside pyplot, so displaying an object
leaves no open figure.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gainlens.plots.markup.style import notebook_style

DPI = 90
LARGEST = 500_000
"""Characters of a drawing, at most: a notebook keeps its outputs in its file."""
CLASS = "gainlens-figure"


@dataclass(frozen=True)
class Display:
    """What a notebook shows of an object with ``plot(ax)``.

    Attributes:
        alt: alternative text for the figure.
        draw: makes the figure as inline SVG, given the alternative text; None for a PNG only.
        size: size of the PNG in inches.
        panels: rows and columns of axes that ``plot`` expects.
        table: header and rows, folded below the figure; none if not given.
        options: of ``plot``.
    """

    alt: str
    draw: Callable[[str], str] | None = None
    size: tuple[float, float] = (7, 4)
    panels: tuple[int, int] = (1, 1)
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Displayed:
    """A result that a notebook shows as a figure: HTML where it takes that, PNG elsewhere."""

    def _display(self) -> Display:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return figure_html(self, self._display())

    def _repr_png_(self) -> bytes:
        return figure_png(self, self._display())


def figure_html(shown: Any, display: Display) -> str:
    """HTML with the object's ``repr``, its figure, and a table; nothing outside of it is needed.

    Args:
        shown: an object with ``plot(ax)``.
        display: how it is shown.
    """
    drawn = "" if display.draw is None else display.draw(display.alt)
    if drawn and len(drawn) <= LARGEST:
        drawn = notebook_style(CLASS) + drawn
    else:
        data = base64.b64encode(figure_png(shown, display)).decode("ascii")
        drawn = (
            f'<img alt="{html.escape(display.alt)}" style="max-width:100%;height:auto;'
            f'background:#fff" src="data:image/png;base64,{data}">'
        )
    return (
        f'<figure class="{CLASS}" style="margin:0;max-width:100%">{drawn}'
        f"<figcaption><code>{html.escape(repr(shown))}</code></figcaption>"
        + ("" if display.table is None else _folded(*display.table))
        + "</figure>"
    )


def figure_png(shown: Any, display: Display) -> bytes:
    """The figure drawn by the object's ``plot``, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=display.size, layout="constrained")
    axes = figure.subplots(*display.panels)
    shown.plot(axes, **display.options)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that opens on a click."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f"<details><summary>{len(rows)} rows</summary><table><thead>{line(head, 'th')}</thead>"
        f"<tbody>{body}</tbody></table></details>"
    )
