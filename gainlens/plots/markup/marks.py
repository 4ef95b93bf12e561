"""Small parts of all inline figures: text, symbols of series, legends."""

from __future__ import annotations

import html
from collections.abc import Sequence

WIDTH = 440
"""Units across a drawing; letters of 13 units stay readable on a phone."""

SYMBOLS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M0-5L5 0L0 5L-5 0z",
    "M-4-4h8v8h-8z",
    "M0-5L5 4h-10z",
    "M-4-4L4 4M4-4L-4 4",
    "M0-5v10M-5 0h10",
)
"""A symbol per series, so that colour is not the only difference."""


def text(x: float, y: float, words: str, classes: str = "", more: str = "") -> str:
    """A text; ``classes`` say how it is aligned."""
    named = f' class="{classes}"' if classes else ""
    return f'<text x="{x:g}" y="{y:g}"{named}{more}>{html.escape(words)}</text>'


def symbol(series: int, x: float, y: float, said: str) -> str:
    """The mark of a point, with what it says when pointed at."""
    title = f"<title>{html.escape(said)}</title>" if said else ""
    return (
        f'<path class="mark s{series % len(SYMBOLS)}" transform="translate({x:.4g} {y:.4g})" '
        f'd="{SYMBOLS[series % len(SYMBOLS)]}">{title}</path>'
    )


def drawing(body: str, height: float, alt: str, width: float = WIDTH) -> str:
    """The SVG around the parts of a figure."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}">'
        f"{body}</svg>"
    )


def legend(names: Sequence[str], line: str = "") -> str:
    """Names of series beside their symbols; ``line`` explains a dashed line."""
    items = [
        f'<li><svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
        f"{symbol(i, 0, 0, '')}</svg>{html.escape(name)}</li>"
        for i, name in enumerate(names)
    ]
    if line:
        items.append(
            '<li><svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
            f'<path class="margin" d="M-7 0h14"/></svg>{html.escape(line)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
