"""Small pieces of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs/results"


def recorded(path: Path) -> Any | None:
    """A recorded run, or None where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def not_yet(what: str, command: str) -> str:
    """What a page says in the place of figures that nobody has recorded."""
    return f"*Not recorded yet: `{command}` writes {what}.*"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A pipe table; numbers as they are in ``number``."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = (cell if isinstance(cell, str) else number(cell) for cell in row)
        lines.append("| " + " | ".join(c.replace("|", "\\|").strip() for c in cells) + " |")
    return "\n".join(lines)


def number(value: Any) -> str:
    """A number as a reader wants it: three or four digits, no exponent where it can be had."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e4:
            return f"{value:.4g}"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.1e}"
    if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
        return (
            " to ".join(number(v) for v in value)
            if len(value) == 2
            else ", ".join(number(v) for v in value)
        )
    return str(value)


def interval(pair: Sequence[float]) -> str:
    """``low to high``, signed."""
    low, high = pair
    return f"{low:+.3f} to {high:+.3f}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def details(summary: str, body: str) -> str:
    """A part that opens on a click."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{body}\n\n</details>'


def provenance(facts: dict[str, Any], file: str) -> str:
    """Where figures come from: the file, and the machine and versions that it names."""
    machine, versions = facts.get("machine") or {}, facts.get("versions") or {}
    parts = [f"`{file}`"]
    for key in ("processor", "name", "cpu", "device"):
        if machine.get(key):
            parts.append(str(machine[key]))
            break
    cores = machine.get("cores") or machine.get("threads")
    if cores:
        parts.append(f"{cores} cores" if machine.get("cores") else f"{cores} threads")
    torch = versions.get("torch") or machine.get("torch")
    if torch:
        parts.append(f"torch {torch}")
    if facts.get("seed") is not None:
        parts.append(f"seed {facts['seed']}")
    return "Source: " + ", ".join(parts) + "."
