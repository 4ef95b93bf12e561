"""The page on healing: one row and one line of the figure per recorded run."""

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
        return not_yet("the healing runs", COMMAND)
    head = (
        "cut, scope",
        "cut alone",
        "refitted",
        "healed",
        "verdict at 0.02",
        "healing tokens",
        "divergence",
        "same top token",
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
        f"Rise of the validation loss of {first['model']} in nats per token, with its interval "
        f"(healed: {_level(first)}; before training: 95%), on "
        f"{text['validation_documents']} speeches of {text['length']} tokens. Nothing "
        f"was measured beyond position {text['length']}. These speeches did not choose the cut, "
        "did not train it and did not decide when to stop. Differences are paired by document "
        f"with the intact model, whose loss is {first['intact_loss']:.3f}. A loss can also fall "
        "because the model is better calibrated. The divergence from the intact model (nats per "
        "token) and the share of positions with the same top token say how close the predictions "
        "themselves are.",
        table(head, body),
        f"![Rise of the loss against healing tokens, for {len(rows)} cuts](pictures/healing.svg)",
        "The curves are measured on calibration speeches that were not trained on. The table is "
        "measured on validation speeches.",
        _cost(rows),
        _published(rows),
        *(
            provenance(facts, f"docs/results/healing_{facts['run']}.json")
            for facts in rows
            if (ROOT / f"docs/results/healing_{facts['run']}.json").is_file()
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _level(facts: dict[str, Any]) -> str:
    """The interval of the verdict: the first records had Student's at 95%."""
    return "99% bootstrap-t" if facts["verdict"].get("context") else "95%"


def _rise(verdict: dict[str, Any]) -> str:
    low, high = verdict["interval"]
    return f"{verdict['estimate']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _cost(rows: list[dict[str, Any]]) -> str:
    facts = rows[0]["facts"]
    active = facts["active_bytes"]
    return (
        f"Trained weights: {', '.join(facts['settings']['train'])}, which is "
        f"{facts['active_parameters']:,} parameters at {rows[0]['fraction_cut']:.0%}. Gradients "
        f"take {facts['gradient_bytes'] / active:.3f} times their bytes, optimiser state "
        f"{facts['optimizer_bytes'] / active:.3f} times."
    )


def _published(rows: list[dict[str, Any]]) -> str:
    deep = [facts for facts in rows if facts["fraction_cut"] >= 0.75]
    if not deep:
        return ""
    said = "; ".join(
        f"with {f['fraction_cut']:.0%} cut, the loss rises from {f['intact_loss']:.3f} by "
        f"{f['verdict']['estimate']:.3f} ({f['verdict']['estimate'] / f['intact_loss']:.1%} of the "
        f"loss, {math.expm1(f['verdict']['estimate']):.1%} of the perplexity) after "
        f"{f['facts']['tokens']:,} tokens"
        for f in deep
    )
    return (
        "The paper *Thin Keys, Full Values* reports 75% of the key cache saved for about 2% of "
        f"quality, after fine-tuning. Here, {said}."
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
            name = f"{facts['fraction_cut']:.0%}, one set for all heads"
        ax.plot(tokens, [row["rise"] for row in points], color=colour, marker=marker,
                markersize=4, label=name)  # fmt: skip
        low, high = zip(*(row["interval"] for row in points), strict=True)
        ax.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(
            facts["before_training"]["zeroed"]["estimate"],
            color=colour, linestyle=":", linewidth=1, label=f"{name}: before training",
        )  # fmt: skip
    ax.axhline(0, color="black", linewidth=1, label="intact model")
    ax.axhline(0.02, color="black", linestyle="--", linewidth=0.8, label="margin: 0.02 nats")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(bottom=-0.02)
    ax.set_yticks([0, 0.02, 0.05, 0.1, 0.3, 1, 3], ["0", "0.02", "0.05", "0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    ax.set_xlabel("healing tokens (thousands)")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_title("SmolLM2-135M: healing a cut (256 tokens)", fontsize=10)
    ax.legend(fontsize=7, loc="upper right")


PICTURE: tuple[float, float, Callable[..., None]] = (5.8, 4.6, picture)
