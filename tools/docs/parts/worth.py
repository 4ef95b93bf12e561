"""What a cut is worth by the recorded runs: after healing, in speed, in training."""

from __future__ import annotations

from typing import Any

from parts import from_scratch, healing
from parts.markdown import RESULTS, not_yet, recorded, table

MARGIN = 0.02
"""The bound of every claim that the loss does not rise, in nats."""


def worth() -> str:
    """Healed cuts, speed and training at virtual width, one row each."""
    rows = [_healed(facts) for facts in healing.runs()]
    slim = recorded(RESULTS / "slim_ledger.json")
    if slim is not None:
        rows.append(_speed(slim))
    training = from_scratch.run()
    if training:
        rows.append(_training(training))
    if not rows:
        return not_yet("what a cut is worth", "make bench-heal acceptance bench-train")
    return table(["claim", "on SmolLM2-135M", "number", "for comparison", "measured on"], rows)


def _healed(facts: dict[str, Any]) -> tuple[str, ...]:
    text = facts["text"]
    verdict, before = facts["verdict"], facts["before_training"]["zeroed"]["estimate"]
    low, high = verdict["interval"]
    where = (
        "one set for all layers and heads"
        if facts["scope"] == "universal"
        else f"one set per {facts['scope']}"
    )
    return (
        f"after healing, {facts['fraction_cut']:.0%} can be cut ({where})",
        f"**{verdict['status']}**",
        f"{verdict['estimate']:+.3f} nats [{low:+.3f}, {high:+.3f}] after "
        f"{facts['facts']['tokens']:,} training tokens (margin {verdict['margin']:g})",
        f"the same cut before training {before:+.3f}",
        f"{text['validation_documents']} speeches × {text['length']} tokens",
    )


def _speed(facts: dict[str, Any]) -> tuple[str, ...]:
    limit, rows = facts["twice_as_fast"]["limit"], facts["contexts"]
    ratios = [row["decode_ratio"] for row in rows]
    status = "holds" if max(ratios) >= 2 else "fails"
    found = ", ".join(f"× {row['decode_ratio']:.2f} at {row['context']:,}" for row in rows)
    best = ", ".join(f"× {row['decode_ratio_to_best_transformers']:.2f}" for row in rows)
    kept = facts["plan"]["keys_kept"]
    return (
        f"without {1 - kept:.0%} of the key dimensions, decoding is twice as fast",
        f"**{status}**",
        f"{found} tokens of context; by bytes at most × {limit:.2f} at any context",
        f"against the fastest attention of transformers: {best}",
        f"{facts['machine']['cores']} CPU cores, batch {facts['batch']}",
    )


def _training(facts: dict[str, Any]) -> tuple[str, ...]:
    text = facts["text"]
    by = {row["arm"]: row for row in facts["arms"]}
    gain, full = by["gain"], by["full"]
    status = "fails" if gain["low"] > MARGIN else "holds" if gain["high"] < MARGIN else "undecided"
    times = gain["seconds per step"] / full["seconds per step"]
    return (
        "training needs only the active dimensions (12 of 64, a small model from scratch)",
        f"**{status}**",
        f"{gain['over full width']:+.3f} nats [{gain['low']:+.3f}, {gain['high']:+.3f}] over full "
        f"width at equal tokens (margin {MARGIN:g})",
        f"time of a step × {times:.2f}",
        f"{text['validation_documents']} documents × {text['length']} tokens",
    )
