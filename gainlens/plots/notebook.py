"""The notebook display of an object: its ``repr``, and its figure with alternative text.

The figure is drawn outside pyplot, so displaying an object leaves no open figure.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

DPI = 90


def figure_html(
    shown: Any,
    alt: str,
    *,
    size: tuple[float, float] = (7, 4),
    panels: tuple[int, int] = (1, 1),
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
    **options: Any,
) -> str:
    """HTML with the object's ``repr``, the figure drawn by its ``plot``, and a table.

    Args:
        shown: an object with ``plot(ax)``.
        alt: alternative text for the figure.
        size: size of the figure in inches.
        panels: rows and columns of axes that ``plot`` expects.
        table: header and rows, folded below the figure; none if not given.
        options: of ``plot``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*panels)
    shown.plot(axes, **options)
    return (
        '<figure style="margin:0;max-width:100%">'
        f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto;background:#fff" '
        f'src="data:image/png;base64,{encoded(figure)}">'
        f"<figcaption><code>{html.escape(repr(shown))}</code></figcaption>"
        + ("" if table is None else _folded(*table))
        + "</figure>"
    )


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that opens on a click."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f"<details><summary>{len(rows)} rows</summary><table><thead>{line(head, 'th')}</thead>"
        f"<tbody>{body}</tbody></table></details>"
    )


def encoded(figure: Any) -> str:
    """A matplotlib figure as base64-encoded PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
