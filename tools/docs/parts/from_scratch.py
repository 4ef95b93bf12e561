"""The page on training from scratch: one row and one line of the figure per arm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parts.ledgers import anything
from parts.markdown import RESULTS, not_yet, provenance, recorded, table

COMMAND = "make bench-train"
RUN, COST = RESULTS / "from_scratch.json", RESULTS / "training_cost.json"
SAID = {
    "full": "full width",
    "born slim": "born slim",
    "gain": "virtual width, picked by gain",
    "random": "virtual width, picked at random",
    "fixed": "virtual width, fixed",
}


def run() -> dict[str, Any]:
    """The recorded run; empty where there is none."""
    return recorded(RUN) or {}


def page() -> str:
    """The table, the figure, what it says about the claim, and what a step costs."""
    facts = run()
    parts = [not_yet("the runs from scratch", COMMAND)] if not facts else _run(facts)
    parts.append("## What a step costs on the real model")
    cost = recorded(COST)
    parts.append(not_yet("the cost of a step", COMMAND) if cost is None else anything(cost, COST))
    return "\n\n".join(parts)


def _run(facts: dict[str, Any]) -> list[str]:
    head = (
        "trained",
        "loss at equal tokens",
        "over full width",
        "by seed",
        "seconds per step",
        "loss at equal time",
    )
    body = []
    for row in facts["arms"]:
        over = "–"
        if row["arm"] != "full":
            over = f"{row['over full width']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        body.append(
            (
                SAID[row["arm"]],
                f"{row['loss at equal tokens']:.3f}",
                over,
                row["seeds, over full width"] if row["arm"] != "full" else "–",
                f"{row['seconds per step']:.3f}",
                f"{row['loss at equal time']:.3f} (step {row['steps at equal time']:.0f})",
            )
        )
    text = facts["text"]
    return [
        f"{facts['model']}; {facts['steps']} steps on {text['rows_trained']:,} rows of "
        f"{text['length']} tokens ({text['source']}, tokenizer {text['tokenizer']}), seeds "
        f"{facts['seeds']}, constant learning rate {facts['lr']:g}. The active dimensions are "
        f"picked after {facts['steps_at_full_width_before_the_pick']} steps at full width. The "
        "loss is in nats per token, the mean over seeds, on "
        f"{text['validation_documents']} validation documents of {text['length']} tokens. The 95% "
        "intervals are over documents, paired with full width. *Equal time* is the time at which "
        "the fastest arm finishes; times per step were measured in turns.",
        table(head, body),
        "![Validation loss over steps, for full width, born slim and three ways to pick the "
        "active dimensions](pictures/scratch.svg)",
        _verdict(facts["arms"]),
        provenance(facts, f"docs/results/{RUN.name}"),
    ]


def _verdict(arms: list[dict[str, Any]]) -> str:
    """What the run says about training at virtual width."""
    by = {row["arm"]: row for row in arms}
    virtual = [by[arm] for arm in ("gain", "random", "fixed")]
    worse = [row for row in virtual if row["low"] > 0]
    if len(worse) == len(virtual):
        first = "At equal tokens every model trained at virtual width is worse than at full width"
    elif worse:
        names = ", ".join(SAID[row["arm"]] for row in worse)
        first = f"At equal tokens these are worse than full width: {names}"
    else:
        first = "At equal tokens no model trained at virtual width is shown to be worse"
    best = min(arms, key=lambda row: row["loss at equal time"])
    times = by["gain"]["seconds per step"] / by["full"]["seconds per step"]
    picks = by["random"]["loss at equal tokens"] - by["gain"]["loss at equal tokens"]
    return (
        f"{first}. At equal time, {SAID[best['arm']]} has the lowest loss. A step at virtual "
        f"width takes {times:.2f} times as long as a step at full width. Picking by gain is "
        f"{abs(picks):.3f} nats {'better' if picks > 0 else 'worse'} than picking at random."
    )


def picture(figure: Any, facts: dict[str, Any]) -> None:
    """Loss against steps, the mean over seeds with their range."""
    import numpy as np

    from gainlens.plots.axes import CYCLE, MARKERS

    ax = figure.subplots()
    for (arm, said), colour, marker in zip(SAID.items(), CYCLE, MARKERS, strict=False):
        rows = [row for row in facts["curves"] if row["arm"] == arm]
        steps = sorted({row["step"] for row in rows if row["step"] > 0})
        found = np.array([[r["loss"] for r in rows if r["step"] == step] for step in steps])
        ax.plot(steps, found.mean(1), color=colour, marker=marker, markersize=3, label=said)
        ax.fill_between(steps, found.min(1), found.max(1), color=colour, alpha=0.15, linewidth=0)
    start = facts["steps_at_full_width_before_the_pick"]
    ax.axvline(start, color="black", linestyle=":", linewidth=0.8, label="the pick")
    ax.set_xlabel("optimiser steps")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title("Small models from scratch, with few of their key dimensions", fontsize=10)
    ax.legend(fontsize=8)


PICTURE: tuple[float, float, Callable[..., None]] = (5.8, 4.0, picture)
