"""How an object looks in a notebook: its one line, and its figure with the words that replace it.

The figure is drawn outside pyplot, so showing an object leaves no figure open behind it.
"""

from __future__ import annotations

import base64
import html
import io
from typing import Any

DPI = 90


def figure_html(
    shown: Any,
    alt: str,
    *,
    size: tuple[float, float] = (7, 4),
    panels: tuple[int, int] = (1, 1),
) -> str:
    """The object's ``repr`` and the figure that its ``plot`` draws, as one piece of HTML.

    Args:
        shown: an object with ``plot(ax)``.
        alt: what the figure shows, in words.
        size: of the figure, inches.
        panels: rows and columns of axes that ``plot`` takes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*panels)
    shown.plot(axes)
    return (
        '<figure style="margin:0;max-width:100%">'
        f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto;background:#fff" '
        f'src="data:image/png;base64,{encoded(figure)}">'
        f"<figcaption><code>{html.escape(repr(shown))}</code></figcaption></figure>"
    )


def encoded(figure: Any) -> str:
    """A matplotlib figure as PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
