"""The tutorials run from top to bottom on the small model, and their pages are made of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/docs"))

import render_tutorials as site

pytestmark = pytest.mark.one_env
NAMES = [path.stem for path in site.tutorials()]


def test_they_are_numbered():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", site.tutorials(), ids=NAMES)
def test_runs_on_the_small_model(path, monkeypatch, tmp_path):
    """Every cell; the asserts in the cells are the tutorial's own controls."""
    monkeypatch.setenv(site.ENV, "tiny")
    monkeypatch.chdir(tmp_path)
    left = list(site.execute(path, tmp_path))
    assert len(left) == sum(cell.kind == "code" for cell in site.cells(path))
    assert any(row["text"].strip() for row in left) and any(row["figures"] for row in left)


@pytest.mark.parametrize("path", site.tutorials(), ids=NAMES)
def test_it_ends_with_a_question_that_the_tool_answers(path):
    _, found, last = site.cells(path)[-1].source.partition("## A question for you\n")
    assert found and "##" not in last, "the last section"
    assert "?" in last and re.search(r"`(gl\.|gainlens |run\.|sites\.)[^`]*`|`parts=", last)


@pytest.mark.parametrize("path", site.tutorials(), ids=NAMES)
def test_its_page_is_current_and_of_the_real_model(path):
    kept = json.loads(site.KEPT.read_text(encoding="utf-8"))
    made = (site.PAGES / f"{path.stem}.md").read_text(encoding="utf-8")
    assert made == site.page(path, kept), "python tools/docs/render_tutorials.py"
    assert kept[path.stem]["model"] == "smollm2"
    current = {cell.key for cell in site.cells(path) if cell.kind == "code"}
    assert current == set(kept[path.stem]["cells"]), "cells changed since the run: --run"
    pictures = [name for row in kept[path.stem]["cells"].values() for name in row["figures"]]
    assert pictures and all((site.PAGES / path.stem / name).exists() for name in pictures)
