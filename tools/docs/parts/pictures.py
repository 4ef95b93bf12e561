"""The pictures of the site and of the README, drawn from the recorded report.

Each SVG names the SHA-256 of what it was drawn from, so a stale one is noticed without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from parts import from_scratch, healing, slots, worth_ledger
from parts.markdown import RESULTS, ROOT, recorded

FOLDER = ROOT / "docs/pictures"
SOURCE = RESULTS / "report_smollm2.json"


def draw() -> None:
    """Draw those that are missing or stale."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "gainlens", "svg.fonttype": "none", "font.family": "sans-serif"}
    for name in stale_names():
        width, height, made, facts_of = PICTURES[name]
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(width, height), layout="constrained")
            made(figure, facts_of())
            figure.savefig(
                FOLDER / f"{name}.svg",
                metadata={"Date": None, "Source": _digest(name, facts_of())},
                transparent=False,
                dpi=100,
            )


def stale() -> list[str]:
    """Pictures that are not of the recorded runs."""
    return [
        f"{(FOLDER / name).relative_to(ROOT)}.svg is stale: run python tools/docs/fill.py"
        for name in stale_names()
    ]


def stale_names() -> list[str]:
    """Names of those that are missing, or of other records; none where nothing is recorded."""
    found = []
    for name, (_, _, _, facts_of) in PICTURES.items():
        path, facts = FOLDER / f"{name}.svg", facts_of()
        if facts and not (
            path.is_file() and _digest(name, facts) in path.read_text(encoding="utf-8")
        ):
            found.append(name)
    return found


def report() -> dict[str, Any]:
    """What the pictures show of the recorded report; empty where there is none."""
    facts = recorded(SOURCE)
    if facts is None:
        return {}
    return {key: facts[key] for key in ("made", "surgery", "map")}


def _digest(name: str, facts: Any) -> str:
    width, height, made, _ = PICTURES[name]
    return hashlib.sha256(json.dumps([made.__name__, width, height, facts]).encode()).hexdigest()


def surgery(figure: Any, facts: dict[str, Any]) -> None:
    """Rise of the loss over the share cut, beside the controls and the margin."""
    from gainlens.plots.axes import BLUE
    from gainlens.plots.curves import CONTROLS

    ax = figure.subplots()
    rows = [r for r in facts["surgery"] if r["label"] is None and r["order"] != "intact"]
    for order in dict.fromkeys(row["order"] for row in rows):
        mine = [row for row in rows if row["order"] == order]
        colour, marker = CONTROLS.get(order, (BLUE, "o"))
        fractions = sorted({row["fraction"] for row in mine})
        at = [[row for row in mine if row["fraction"] == f] for f in fractions]
        mean = np.array([np.mean([row["delta"] for row in group]) for group in at])
        low = np.array([min(row["interval"][0] for row in group) for group in at])
        high = np.array([max(row["interval"][1] for row in group) for group in at])
        ax.errorbar(
            [100 * f for f in fractions],
            mean,
            yerr=np.abs([mean - low, high - mean]),
            color=colour,
            marker=marker,
            capsize=3,
            label=f"{order} pairs" + (" (control)" if order in CONTROLS else " (by qk)"),
        )
    ax.axhline(0.02, color="black", linestyle="--", linewidth=0.8, label="margin: 0.02 nats")
    ax.set_yscale("symlog", linthresh=0.02)
    ax.set_ylim(0, 10)
    ax.set_yticks([0, 0.02, 0.1, 1, 10], ["0", "0.02", "0.1", "1", "10"])
    ax.minorticks_off()
    ax.set_xlabel("share of key dimensions cut (%)")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_title("SmolLM2-135M, no refit, no training (256 tokens)", fontsize=10)
    ax.legend(fontsize=8)


ZEROED, REFITTED = "fisher, layer, zeroed", "fisher, layer, refitted"
SHOWN = ("sotu", "stdlib")
"""Texts of the first picture: the two that the slots were fitted and healed on."""


def half() -> dict[str, Any]:
    """Rise of the loss by position with half of the keys cut; empty where it is not recorded."""
    made, slots_run = recorded(SOURCE), recorded(RESULTS / "slots_universal-50.json")
    if made is None or slots_run is None:
        return {}
    found: dict[str, dict[str, Any]] = {name: {} for name in SHOWN}
    for text in SHOWN:
        rows = made["reach"]["by_position"][text]["rows"]
        for label, cut in (
            ("one set per layer, zeroed", ZEROED),
            ("one set per layer, refitted (no training)", REFITTED),
        ):
            found[text][label] = [_place(row) for row in rows if row["cut"] == cut]
        for label, state in (
            ("one set for all heads, slots (no training)", "untrained"),
            ("one set for all heads, slots, healed", "healed"),
        ):
            if slots_run[state] is not None:
                rows = slots_run[state]["by_position"][text]["rows"]
                found[text][label] = [_place(row) for row in rows]
    return found


def _place(row: dict[str, Any]) -> tuple[float, float]:
    """Middle of a bucket of positions on a logarithmic axis, and the rise there."""
    return float(np.sqrt(max(16, row["first"]) * (row["last"] + 1))), row["rise"]


def cuts(figure: Any, facts: dict[str, Any]) -> None:
    """Rise of the loss by position when half of the key pairs go, from zeroed to healed."""
    from gainlens.plots.axes import CYCLE, MARKERS

    panels = figure.subplots(1, len(facts), sharey=True)
    titles = {"sotu": "speeches", "stdlib": "code"}
    for ax, (text, lines) in zip(panels, facts.items(), strict=True):
        for (label, points), colour, marker in zip(lines.items(), CYCLE, MARKERS, strict=False):
            places, rises = zip(*points, strict=True)
            ax.plot(places, rises, color=colour, marker=marker, label=label)
        ax.axhline(0.02, color="black", linestyle="--", linewidth=0.8, label="margin: 0.02 nats")
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=0.02)
        ax.set_ylim(0, 2)
        ax.set_yticks([0, 0.02, 0.1, 0.5, 1], ["0", "0.02", "0.1", "0.5", "1"])
        ax.minorticks_off()
        ax.set_xticks([30, 100, 300, 1000], ["30", "100", "300", "1,000"])
        ax.set_xlabel("position in the text (tokens)")
        ax.set_title(titles.get(text, text), fontsize=10)
    panels[0].set_ylabel("rise of the loss (nats per token)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2
    )


def cosine(figure: Any, facts: dict[str, Any]) -> None:
    """The cosine between layers."""
    from gainlens.plots.axes import SEQUENTIAL

    found = np.array(facts["map"]["cosine"])
    _by_layer(figure, found, SEQUENTIAL, 0, 1, "cosine", "cosine between layers")


def above_null(figure: Any, facts: dict[str, Any]) -> None:
    """What is left of the cosine above what the rotary frequencies alone give."""
    from gainlens.plots.axes import DIVERGING

    found = facts["map"]
    null = found.get("frequency_null_cosine") or found["band_null_cosine"]  # its earlier name
    above = np.array(found["cosine"]) - np.array(null)
    np.fill_diagonal(above, np.nan)
    end = float(np.nanmax(np.abs(above)))
    _by_layer(
        figure, above, DIVERGING, -end, end, "cosine minus null", "minus what frequencies explain"
    )


def _by_layer(
    figure: Any, values: Any, colours: str, low: float, high: float, label: str, title: str
) -> None:
    from gainlens.plots.axes import whole_numbers

    ax = figure.subplots()
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label, shrink=0.9)
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    ax.set_title(title, fontsize=10)
    whole_numbers(ax, "x", "y")


def gains(figure: Any, facts: dict[str, Any]) -> None:
    """Gain of every rotary pair in every layer."""
    from gainlens.plots.axes import DIVERGING, colour_bar, whole_numbers

    ax = figure.subplots()
    profiles = np.array(facts["map"]["profiles"])
    relative = np.log2(np.clip(profiles / profiles.mean(1, keepdims=True), 2**-3, 2**3))
    image = ax.imshow(
        relative, aspect="auto", cmap=DIVERGING, vmin=-3, vmax=3, interpolation="nearest"
    )
    colour_bar(ax, image, "log2 of gain / mean of the layer")
    ax.set_xlabel("rotary pair (fast on the left, slow on the right)")
    ax.set_ylabel("layer")
    ax.set_title("SmolLM2-135M: gain of each rotary pair", fontsize=10)
    whole_numbers(ax, "x", "y")


# Inches: small, so that the words can be read on a phone.
PICTURES: dict[str, tuple[float, float, Callable[..., None], Callable[[], Any]]] = {
    "cuts": (6.8, 4.2, cuts, half),
    "surgery": (5.4, 3.8, surgery, report),
    "cosine": (4.4, 3.6, cosine, report),
    "above_null": (4.4, 3.6, above_null, report),
    "gains": (5.4, 3.6, gains, report),
    "healing": (*healing.PICTURE, healing.runs),
    "slots": (5.4, 5.6, slots.picture, slots.frequencies),
    "worth": (5.8, 4.2, worth_ledger.picture, worth_ledger.facts),
    "scratch": (*from_scratch.PICTURE, from_scratch.run),
}
