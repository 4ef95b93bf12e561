"""What recorded runs say of what a cut is worth: after healing, in speed, in training."""

from __future__ import annotations

from typing import Any

from parts import from_scratch, healing
from parts.markdown import RESULTS, not_yet, recorded, table

MARGIN = 0.02
"""The bound of every claim that the loss does not rise, in nats."""


def worth() -> str:
    """Healed cuts, "ghost compute" and "virtual width", one row each."""
    rows = [_healed(facts) for facts in healing.runs()]
    slim = recorded(RESULTS / "slim_ledger.json")
    if slim is not None:
        rows.append(_speed(slim))
    training = from_scratch.run()
    if training:
        rows.append(_training(training))
    if not rows:
        return not_yet("what a cut is worth", "make bench-heal acceptance bench-train")
    return table(["claim", "says SmolLM2-135M", "number", "beside it"], rows)


def _healed(facts: dict[str, Any]) -> tuple[str, ...]:
    verdict, before = facts["verdict"], facts["before_training"]["zeroed"]["estimate"]
    low, high = verdict["interval"]
    where = (
        "one set for all layers" if facts["scope"] == "universal" else f"sets per {facts['scope']}"
    )
    return (
        f"{facts['fraction_cut']:.0%} can go once healed ({where})",
        f"**{verdict['status']}**",
        f"{verdict['estimate']:+.3f} nats [{low:+.3f}, {high:+.3f}] after "
        f"{facts['facts']['tokens']:,} tokens (bound {verdict['margin']:g})",
        f"cut alone {before:+.3f}",
    )


def _speed(facts: dict[str, Any]) -> tuple[str, ...]:
    limit, rows = facts["twice_as_fast"]["limit"], facts["contexts"]
    ratios = [row["decode_ratio"] for row in rows]
    status = "holds" if max(ratios) >= 2 else "fails"
    found = ", ".join(f"× {row['decode_ratio']:.2f} at {row['context']:,}" for row in rows)
    best = ", ".join(f"× {row['decode_ratio_to_best_transformers']:.2f}" for row in rows)
    kept = facts["plan"]["keys_kept"]
    return (
        f"{1 - kept:.0%} of the keys is ghost compute: skip it and decoding doubles",
        f"**{status}**",
        f"{found} tokens of context; by bytes at most × {limit:.2f} at any context",
        f"transformers' best attention: {best}",
    )


def _training(facts: dict[str, Any]) -> tuple[str, ...]:
    by = {row["arm"]: row for row in facts["arms"]}
    gain, full = by["gain"], by["full"]
    status = "fails" if gain["low"] > MARGIN else "holds" if gain["high"] < MARGIN else "undecided"
    times = gain["seconds per step"] / full["seconds per step"]
    return (
        "training needs the active dimensions alone (12 of 64, a small model from scratch)",
        f"**{status}**",
        f"{gain['over full width']:+.3f} nats [{gain['low']:+.3f}, {gain['high']:+.3f}] over full "
        f"width at equal tokens (bound {MARGIN:g})",
        f"time of a step × {times:.2f}",
    )
