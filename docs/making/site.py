"""Hooks of the site's build: mathematics as MathML, and the tutorials that are there.

Browsers typeset MathML by themselves, so the pages load nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_config(config: Any) -> Any:
    """Put every page of ``docs/tutorials`` into the navigation, by file name."""
    docs = Path(config["docs_dir"])
    pages = [p.relative_to(docs).as_posix() for p in sorted(docs.glob("tutorials/*.md"))]
    for entry in list(config["nav"]):
        if isinstance(entry, dict) and "Tutorials" in entry:
            entry["Tutorials"] = pages
            if not pages:
                config["nav"].remove(entry)
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Turn what arithmatex marked into MathML."""
    return MATH.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "inline" if match["open"] == "(" else "block"
    made = convert(html.unescape(match["tex"]).strip(), display=display)
    return f'<{match["tag"]} class="math">{made}</{match["tag"]}>'
