"""The page: one HTML file that needs no network."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PageFigure:
    """A figure with alternative text.

    Attributes:
        data: PNG in base64.
        alt: what it shows, in words.
        caption: the line below the figure.
        width, height: in pixels, so that the layout is stable while the page loads.
    """

    data: str
    alt: str
    caption: str
    width: int
    height: int

    @classmethod
    def of(cls, path: Path, alt: str, caption: str) -> PageFigure:
        """Embed a PNG file."""
        content = path.read_bytes()
        # A PNG starts with 8 bytes of signature and the header chunk: width and height at 16.
        width, height = struct.unpack(">II", content[16:24])
        return cls(base64.b64encode(content).decode("ascii"), alt, caption, width, height)


@dataclass(frozen=True)
class PageTable:
    """A table of strings.

    Attributes:
        caption: title shown above the table.
        head: names of the columns.
        rows: one string per column in each row.
        words: columns that contain text; the first always does, the others contain numbers.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)


def render_page(**content: Any) -> str:
    """Fill the template; all values are escaped."""
    from jinja2 import Environment, StrictUndefined

    source = files("gainlens.report").joinpath("templates/index.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(**content)
