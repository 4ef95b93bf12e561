"""What the site's build adds: titles, pictures that open, mathematics in a font that has it."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/docs"))

import mkdocs_hooks as site

pytestmark = pytest.mark.one_env

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ITALIC = {c: chr(0x1D434 + i) for i, c in enumerate(LETTERS)} | {"h": "\u210e"}
"""What a browser draws for a variable of one letter."""


def test_tutorials_are_named_by_their_headings():
    config = site.on_config({"docs_dir": str(ROOT / "docs"), "nav": [{"Tutorials": []}]})
    entries = config["nav"][0]["Tutorials"]
    titles = [title for entry in entries for title in entry]
    assert [title[:2] for title in titles] == ["1 ", "2 ", "3 ", "4 ", "5 ", "6 "]
    for entry in entries:
        ((title, page),) = entry.items()
        assert f"# {title}\n" in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_no_tutorials_no_entry(tmp_path):
    config = site.on_config({"docs_dir": str(tmp_path), "nav": ["index.md", {"Tutorials": []}]})
    assert config["nav"] == ["index.md"]


def test_a_picture_opens_alone():
    made = site.on_page_content('<p><img alt="words" src="01/figure.png" /></p>')
    assert made == (
        '<p><a class="picture" href="01/figure.png"><img alt="words" src="01/figure.png" /></a></p>'
    )
    embedded = '<img alt="x" src="data:image/png;base64,AA==">'
    assert site.on_page_content(embedded) == embedded


def test_attributes_that_share_a_line_are_named():
    row = (
        '<td><code><span title="x.cosine,">cosine,</span></code></td>\n<td>\n<code>(<span '
        'title="x.p">p_value</span>, spearman)</code>\n</td><td>words</td>'
    )
    assert site.on_page_content(row) == (
        "<td><code>cosine</code>, <code>p_value</code>, <code>spearman</code></td><td></td>"
        "<td>words</td>"
    )
    usual = "<td><code>name</code></td><td><code>str</code></td>"
    assert site.on_page_content(usual) == usual


def test_every_picture_of_a_page_has_words_and_is_there():
    """In README and the site; links within the tutorials' pages are tested with them."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for words, file in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
            assert len(words) > 20, f"{page.name}: {file} has no words in its place"
            assert (page.parent / file).is_file(), f"{page.name}: {file} is not there"


def test_the_font_has_every_sign_of_the_formulas():
    """A phone without a font for mathematics shows a formula in the font of the site."""
    pytest.importorskip("latex2mathml")
    from fontTools.ttLib import TTFont

    font = TTFont(ROOT / "docs/pictures/stix-two-math.woff")
    assert "MATH" in font
    known = set(font.getBestCmap())
    formulas = 0
    for page in (ROOT / "docs").rglob("*.md"):
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", prose, re.S):
            left, right = ("\\[", "\\]") if display else ("\\(", "\\)")
            tex = (display or inline).strip()
            marked = f'<span class="arithmatex">{left}{html.escape(tex)}{right}</span>'
            made = site.on_page_content(marked)
            assert "<math" in made, f"{page.name}: {tex} is not typeset"
            shown = html.unescape(re.sub(r"<[^>]+>", "", made))
            shown += "".join(ITALIC.get(letter, "") for letter in shown)
            formulas += 1
            missing = {sign for sign in shown if ord(sign) not in known and not sign.isspace()}
            assert not missing, f"{page.name}: {tex}: the font lacks {missing}"
    assert formulas > 30
