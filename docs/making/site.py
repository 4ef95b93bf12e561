"""Hooks of the site's build: mathematics as MathML, pictures that open, and the tutorials.

Browsers typeset MathML by themselves, with the font that lies beside the pictures, so the pages
load nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
PICTURE = re.compile(r'<img [^>]*?src="(?P<src>[^":]+)"[^>]*>')
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put every page of ``docs/tutorials`` into the navigation, in order, by its heading."""
    docs = Path(config["docs_dir"])
    pages = [
        {_title(p): p.relative_to(docs).as_posix()} for p in sorted(docs.glob("tutorials/*.md"))
    ]
    for entry in list(config["nav"]):
        if isinstance(entry, dict) and "Tutorials" in entry:
            entry["Tutorials"] = pages
            if not pages:
                config["nav"].remove(entry)
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Turn what arithmatex marked into MathML, and let a picture open alone, to be enlarged."""
    return PICTURE.sub(r'<a class="picture" href="\g<src>">\g<0></a>', MATH.sub(_mathml, content))


def _title(page: Path) -> str:
    found = TITLE.search(page.read_text(encoding="utf-8"))
    return found[1] if found else page.stem


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert  # of the extra "docs": not needed to read the rest

    display = "inline" if match["open"] == "(" else "block"
    made = convert(html.unescape(match["tex"]).strip(), display=display)
    return f'<{match["tag"]} class="math">{made}</{match["tag"]}>'
