"""The ledger of healing: one row and one line of the figure per recorded run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from parts.markdown import RESULTS, ROOT, not_yet, provenance, recorded, table

COMMAND = "make bench-heal"
ORDER = ("layer-50", "head-50", "universal-50", "layer-75", "layer-80")


def runs() -> list[dict[str, Any]]:
    """Every recorded run, in the order of the page."""
    found = [recorded(path) for path in RESULTS.glob("healing_*.json")]
    return sorted(
        (facts for facts in found if facts is not None),
        key=lambda facts: ORDER.index(facts["run"]) if facts["run"] in ORDER else len(ORDER),
    )


def page() -> str:
    """The table, the figure, what it says, and where each row is from."""
    rows = runs()
    if not rows:
        return not_yet("the runs of healing", COMMAND)
    head = (
        "cut, scope",
        "cut alone",
        "refitted",
        "healed",
        "verdict at 0.02",
        "healing tokens",
        "divergence",
        "same first choice",
    )
    body = [
        (
            f"{facts['fraction_cut']:.0%} {facts['scope']}",
            _rise(facts["before_training"]["zeroed"]),
            _rise(facts["before_training"]["refitted"]),
            _rise(facts["verdict"]),
            f"**{facts['verdict']['status']}**",
            f"{facts['facts']['tokens']:,}",
            f"{facts['likeness']['divergence_nats']:.3f}",
            f"{facts['likeness']['top1_agreement']:.1%}",
        )
        for facts in rows
    ]
    first = rows[0]
    text = first["text"]
    parts = [
        f"Rise of the validation loss of {first['model']} in nats per token with its 95% interval, "
        f"on {text['validation_documents']} speeches of {text['length']} tokens that neither "
        "chose the cut, nor trained, nor said when to stop; paired by document with the intact "
        f"model, whose loss is {first['intact_loss']:.3f}. Divergence (nats per token) and the "
        "share of positions with the same first choice say how like the intact model's the "
        "predictions are: a loss alone can also fall by better calibration.",
        table(head, body),
        f"![Rise of the loss against healing tokens, for {len(rows)} cuts](pictures/healing.svg)",
        "The curves are drawn on calibration speeches that were not trained on; the table is "
        "judged on others.",
        _cost(rows),
        _published(rows),
        *(
            provenance(facts, f"docs/results/healing_{facts['run']}.json")
            for facts in rows
            if (ROOT / f"docs/results/healing_{facts['run']}.json").is_file()
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _rise(verdict: dict[str, Any]) -> str:
    low, high = verdict["interval"]
    return f"{verdict['estimate']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _cost(rows: list[dict[str, Any]]) -> str:
    facts = rows[0]["facts"]
    active = facts["active_bytes"]
    return (
        f"What is trained: {', '.join(facts['settings']['train'])}; "
        f"{facts['active_parameters']:,} numbers at {rows[0]['fraction_cut']:.0%}. Gradients take "
        f"{facts['gradient_bytes'] / active:.3f} and the optimiser "
        f"{facts['optimizer_bytes'] / active:.3f} times the bytes of these."
    )


def _published(rows: list[dict[str, Any]]) -> str:
    deep = [facts for facts in rows if facts["fraction_cut"] >= 0.75]
    if not deep:
        return ""
    said = "; ".join(
        f"{f['fraction_cut']:.0%} cut: the loss rises from {f['intact_loss']:.3f} by "
        f"{f['verdict']['estimate']:.3f} ({f['verdict']['estimate'] / f['intact_loss']:.1%} of the "
        f"loss, {math.expm1(f['verdict']['estimate']):.1%} of the perplexity) after "
        f"{f['facts']['tokens']:,} tokens"
        for f in deep
    )
    return (
        "*Thin Keys, Full Values* publishes 75% of the key cache saved at about 2% of quality, "
        f"after fine-tuning. Here {said}."
    )


def picture(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Loss against tokens, one line per run."""
    from gainlens.plots.axes import CYCLE, MARKERS

    ax = figure.subplots()
    for facts, colour, marker in zip(rows, CYCLE, MARKERS, strict=False):
        points = [row for row in facts["curve"] if row.get("rise") is not None]
        tokens = [row["tokens"] / 1000 for row in points]
        name = f"{facts['fraction_cut']:.0%}, one set per {facts['scope']}"
        if facts["scope"] == "universal":
            name = f"{facts['fraction_cut']:.0%}, one set for all"
        ax.plot(tokens, [row["rise"] for row in points], color=colour, marker=marker,
                markersize=4, label=name)  # fmt: skip
        low, high = zip(*(row["interval"] for row in points), strict=True)
        ax.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(
            facts["before_training"]["zeroed"]["estimate"],
            color=colour, linestyle=":", linewidth=1, label=f"{name}: cut, untrained",
        )  # fmt: skip
    ax.axhline(0, color="black", linewidth=1, label="intact model")
    ax.axhline(0.02, color="black", linestyle="--", linewidth=0.8, label="margin: 0.02 nats")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(bottom=-0.02)
    ax.set_yticks([0, 0.02, 0.05, 0.1, 0.3, 1, 3], ["0", "0.02", "0.05", "0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    ax.set_xlabel("healing tokens (thousands)")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_title("SmolLM2-135M: how fast a cut heals", fontsize=10)
    ax.legend(fontsize=7, loc="upper right")


PICTURE: tuple[float, float, Callable[..., None]] = (5.8, 4.6, picture)
