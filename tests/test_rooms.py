"""A room imports only from rooms to its left, and the kernels import nothing from gainlens."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "probes", "ablation", "analysis", "export", "training", "report")

pytestmark = pytest.mark.one_env


def imported(tree: ast.Module):
    """Modules imported when the file is loaded; a figure drawn on demand may look further."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_rooms_import_only_from_their_left():
    wrong = []
    for position, room in enumerate(ROOMS):
        for path in (ROOT / "gainlens" / room).rglob("*.py"):
            for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
                parts = name.split(".")
                if parts[0] == "gainlens" and len(parts) > 1 and parts[1] in ROOMS[position + 1 :]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_kernels_import_nothing_from_gainlens():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "gainlens" for n in names), path
