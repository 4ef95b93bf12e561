"""The README's blocks run, and its tables are those of the recorded results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import gainlens as gl

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.one_env
def test_tables_are_filled_from_recorded_results():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    assert fill.filled(README) == README
    assert "**fails**" in README


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_blocks_run(block, monkeypatch, capsys):
    """On the small model, with documents of a length that it takes."""
    load = gl.load_model
    monkeypatch.setattr(gl, "load_model", lambda name, **k: load("tiny", **k))
    exec(compile(block, "README.md", "exec"), {})
    assert "Verdict(" in capsys.readouterr().out


def test_every_public_name_is_documented():
    for name in gl.__all__:
        assert (getattr(gl, name).__doc__ or "").strip(), name
