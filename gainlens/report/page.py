"""The page: one HTML file that needs no network."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PageFigure:
    """A figure with the words that replace it for who can't see it."""

    data: str
    alt: str
    caption: str

    @classmethod
    def of(cls, path: Path, alt: str, caption: str) -> PageFigure:
        """Embed a PNG file."""
        return cls(base64.b64encode(path.read_bytes()).decode("ascii"), alt, caption)


@dataclass(frozen=True)
class PageTable:
    """A table of strings."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)


def render_page(**content: Any) -> str:
    """Fill the template; everything is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = files("gainlens.report").joinpath("templates/index.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(**content)
