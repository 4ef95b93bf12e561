"""The notebook display of an object: its ``repr``, and its figure with alternative text.

The figure is drawn outside pyplot, so displaying an object leaves no open figure.
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
    """HTML with the object's ``repr`` and the figure drawn by its ``plot``.

    Args:
        shown: an object with ``plot(ax)``.
        alt: alternative text for the figure.
        size: size of the figure in inches.
        panels: rows and columns of axes that ``plot`` expects.
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
    """A matplotlib figure as base64-encoded PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
