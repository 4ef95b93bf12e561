"""The page: one HTML file that needs no network and can be read without its script."""

from __future__ import annotations

import base64
import html
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gainlens.plots.markup import colours
from gainlens.plots.markup.style import figure_rules


@dataclass(frozen=True)
class View:
    """One drawing of a figure.

    Attributes:
        choice: what is chosen, one value per choice of the figure.
        markup: the drawing, as HTML that is safe to insert.
    """

    choice: tuple[str, ...]
    markup: str


@dataclass(frozen=True)
class PageFigure:
    """A figure, with its words, its data, and the line that makes it.

    Attributes:
        name: of the file with its data.
        alt: what it shows, in words.
        caption: the line below the figure.
        views: its drawings; the first is shown until another is chosen.
        choices: names of what can be chosen, with all values.
        csv: its data, header first.
        python: the line of Python that makes it in the folder of the report.
        heat: what the script needs to draw further views of a heat map from ``csv``.
    """

    name: str
    alt: str
    caption: str
    views: tuple[View, ...]
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    csv: str = ""
    python: str = ""
    heat: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, path: Path, alt: str, caption: str) -> PageFigure:
        """A figure that is a PNG file."""
        content = path.read_bytes()
        # A PNG starts with 8 bytes of signature and the header chunk: width and height at 16.
        width, height = struct.unpack(">II", content[16:24])
        data = base64.b64encode(content).decode("ascii")
        image = (
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" '
            f'width="{width}" height="{height}">'
        )
        return cls(path.stem, alt, caption, (View((), image),))

    @property
    def data_link(self) -> str:
        """The data as a link that needs no network."""
        return "data:text/csv;charset=utf-8," + quote(self.csv, safe=",.:;/()+=-_")

    @property
    def heat_json(self) -> str:
        """What the script reads."""
        return json.dumps(self.heat, ensure_ascii=False, separators=(",", ":"))


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


def csv_of(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Comma-separated values; numbers keep four digits, what is not finite stays empty."""
    lines: list[list[object]] = [list(head), *(list(row) for row in rows)]
    return "".join(",".join(map(_cell, line)) + "\r\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        shown = f"{value:.4g}"
        return "" if shown in ("nan", "inf", "-inf") else shown
    words = str(value)
    if any(c in words for c in ',"\r\n'):
        return '"' + words.replace('"', '""') + '"'
    return words


def render_page(**content: Any) -> str:
    """Fill the template; all values are escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_template)
    )
    schemes = {name: colours.variables(name) for name in ("light", "dark")}
    given = {
        "next_step": None,
        "colours": schemes,
        "colour_rules": colours.rules(),
        "figure_rules": figure_rules(),
        **content,
    }
    return environment.get_template("index.html").render(**given)


def _template(name: str) -> str:
    return files("gainlens.report").joinpath("templates", name).read_text(encoding="utf-8")
