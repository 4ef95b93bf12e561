"""Fill README.md and the pages of docs from recorded results and the code's own tables.

    python tools/docs/fill.py            # rewrite pages and figures
    python tools/docs/fill.py --check    # exit 1 and name each stale page and undocumented name

Why not cog: it would put Python into the pages. Here a page has only a marker, and what it stands
for is a tested function in ``parts``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts import (
    api,
    behind_norm,
    claims,
    docstrings,
    from_scratch,
    healing,
    large,
    ledgers,
    loading,
    models,
    pictures,
    slim,
    slots,
    support,
    vllm_plugin,
    worth,
    worth_ledger,
)
from parts.markdown import ROOT

PARTS: dict[str, Callable[[], str]] = {
    "claims": claims.claims,
    "findings": claims.findings,
    "cuts": claims.cuts,
    "worth": worth.worth,
    "worth ledger": worth_ledger.page,
    "worth answer": worth_ledger.short,
    "price": claims.price,
    "rivals": slots.rivals,
    "budgets": slots.budgets,
    "surgery": claims.surgery,
    "position": claims.position,
    "across texts": claims.across,
    "tasks": claims.tasks,
    "slots": slots.page,
    "similarity": claims.similarity,
    "sharing cost": claims.sharing_cost,
    "planted": claims.planted,
    "behind norm": behind_norm.page,
    "models claims": models.claims,
    "control": models.control,
    "models numbers": models.numbers,
    "models cuts": models.cuts,
    "prediction": models.prediction,
    "mapped weights": models.mapped,
    "larger than memory": large.page,
    "support": support.support,
    "slim families": support.parity,
    "scores": support.scores,
    "modes": support.modes,
    "engines": support.engines,
    "kernel ledger": ledgers.kernels,
    "engine ledger": ledgers.engines,
    "loading": loading.page,
    "vllm plugin": vllm_plugin.page,
    "slim ledger": slim.page,
    "healing ledger": healing.page,
    "scratch ledger": from_scratch.page,
    "cost ledger": ledgers.cost,
} | {f"api {room}": partial(api.page, room) for room in api.PAGES}
"""A page says ``<!-- NAME -->`` … ``<!-- /NAME -->``; what is between them is made here."""


def pages() -> list[Path]:
    """The pages that are filled."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *written()]


def written() -> list[Path]:
    """The pages of the site that are written by hand: all but those made of the tutorials."""
    docs = ROOT / "docs"
    made = (docs / "tutorials", docs / "results")
    return sorted(p for p in docs.rglob("*.md") if not any(p.is_relative_to(m) for m in made))


def filled(text: str) -> str:
    """``text`` with every marked part made anew."""
    for name, make in PARTS.items():
        if f"<!-- {name} -->" not in text:
            continue
        made = make()
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, made=made: f"{m[1]}{made}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def stale() -> list[str]:
    """What ``python tools/docs/fill.py`` would change."""
    found = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            found.append(f"{path.relative_to(ROOT)} is stale: run python tools/docs/fill.py")
    return found + pictures.stale()


def main() -> int:
    """Fill, or check."""
    if "--check" in sys.argv:
        faults = stale() + docstrings.faults()
        for fault in faults:
            sys.stderr.write(fault + "\n")
        return int(bool(faults))
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
    pictures.draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
