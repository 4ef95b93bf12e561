"""Cuts judged by text and position: one row per recorded run of ``benchmarks/slots.py``."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, not_yet, provenance, recorded, table

ORDER = ("layer-50", "universal-50", "layer-75", "universal-75")


def page() -> str:
    """Rise of the loss on each text, the worst position, and the verdicts."""
    found = {name: recorded(RESULTS / f"slots_{name}.json") for name in ORDER}
    runs = {name: facts for name, facts in found.items() if facts is not None}
    if not runs:
        return not_yet("the cuts by text and position", "python benchmarks/slots.py")
    rows = []
    for facts in runs.values():
        for state in ("untrained", "healed"):
            if facts[state] is not None:
                rows.append(
                    (f"{facts['fraction']:.0%} {facts['scope']}", state, *_row(facts[state]))
                )
    first = next(iter(runs.values()))
    texts = list(first["untrained"]["verdicts"])
    head = ["half or more of the pairs cut, scope", "", *(f"{name}, 256 tokens" for name in texts)]
    head += ["worst positions of 2,048", "verdicts at 0.02"]
    counts = [f"{v['n_documents']} of {n}" for n, v in first["untrained"]["verdicts"].items()]
    calibration = first["text"]["calibration"]
    parts = [
        table(head, rows),
        f"Rise of the loss in nats per token, with 99% intervals, on {', '.join(counts)}; by "
        f"position on long documents of {' and '.join(first['untrained']['by_position'])}. Fitted "
        f"on {calibration['documents']} documents of {' and '.join(calibration['texts'])} "
        f"({calibration['tokens']:,} tokens); nothing was learned from "
        f"{', '.join(n for n in texts if n not in calibration['texts'])}.",
        *(
            f"{facts['fraction']:.0%} {facts['scope']}: fitted in {facts['fit']['seconds']:.0f} s"
            + (
                f"; healed on {facts['healed']['facts']['tokens']:,} tokens"
                if facts["healed"]
                else ""
            )
            + f". {provenance(facts, f'docs/results/slots_{name}.json')}"
            for name, facts in runs.items()
        ),
    ]
    return "\n\n".join(parts)


def _row(judged: dict[str, Any]) -> tuple[str, ...]:
    short = [
        f"{v['estimate']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]"
        for v in judged["verdicts"].values()
    ]
    rise, where, text = max(
        (row["rise"], f"{row['first']:,}–{row['last']:,}", name)
        for name, found in judged["by_position"].items()
        for row in found["rows"]
    )
    states = dict.fromkeys(v["status"] for v in judged["verdicts"].values())
    return (*short, f"{rise:+.3f} ({text}, {where})", ", ".join(states))
