"""Which folder loads where, from ``benchmarks/loading.py``."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, not_yet, provenance, recorded, table


def page() -> str:
    """A row per folder, a column per loader; the reasons below."""
    facts = recorded(RESULTS / "loading.json")
    if facts is None:
        return not_yet("which folder loads where", "python benchmarks/loading.py")
    cells = facts["cells"]
    loaders = list(next(iter(cells.values())))
    rows = [(name, *(_cell(row.get(who)) for who in loaders)) for name, row in cells.items()]
    why: dict[str, list[str]] = {}
    for name, row in cells.items():
        for who, found in row.items():
            if found is not None and not found["loads"] and found["why"] != "another format":
                why.setdefault(f"{who}: {found['why']}", []).append(name)
    versions = {found["engine"] for row in cells.values() for found in row.values()
                if found is not None and found["loads"]}  # fmt: skip
    parts = [
        table(["folder", *loaders], rows),
        f"Prompts whose {facts['new_tokens']} greedy tokens are those of the slim model, of "
        f"{facts['prompts']}; lm_eval: largest difference of a log-likelihood, nats. Run with "
        f"{', '.join(sorted(versions))}.",
    ]
    if why:
        parts.append("\n".join(f"- {', '.join(names)}: {text}" for text, names in why.items()))
    parts.append(provenance(facts, "docs/results/loading.json"))
    return "\n\n".join(parts)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None or found["loads"] is None:
        return "–"
    if not found["loads"]:
        return "no"
    if "log_likelihood_difference" in found:
        return f"{found['log_likelihood_difference']:.1e}"
    return f"{found['same']} of {found['of']}"
