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
GROUP = re.compile(
    r"<td><code>(?:<[^>]*>)*(?P<first>\w+),(?:<[^>]*>)*</code></td>"
    r"\s*<td>\s*<code>(?P<rest>.*?)</code>\s*</td>",
    re.DOTALL,
)
"""``a, b: …`` in a docstring's list of attributes: taken as a name ``a,`` of the type ``b``."""
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
    """Formulas as MathML, pictures that open alone to be enlarged, attributes by their names."""
    content = GROUP.sub(_names, MATH.sub(_mathml, content))
    return PICTURE.sub(r'<a class="picture" href="\g<src>">\g<0></a>', content)


def _names(match: re.Match[str]) -> str:
    rest = re.findall(r"\w+", re.sub(r"<[^>]*>", "", match["rest"]))
    names = ", ".join(f"<code>{name}</code>" for name in (match["first"], *rest))
    return f"<td>{names}</td><td></td>"


def _title(page: Path) -> str:
    found = TITLE.search(page.read_text(encoding="utf-8"))
    return found[1] if found else page.stem


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert  # of the extra "docs": not needed to read the rest

    display = "inline" if match["open"] == "(" else "block"
    made = convert(html.unescape(match["tex"]).strip(), display=display)
    return f'<{match["tag"]} class="math">{made}</{match["tag"]}>'
