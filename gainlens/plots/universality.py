"""Figures of rotary slots: the price of sharing them, and what moves where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gainlens.plots.axes import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    colour_bar,
    new_axes,
    new_panels,
    title,
)

if TYPE_CHECKING:
    from gainlens.analysis.map.universality import UniversalityPrice

SHARED_BY = {
    "head": "a set per head",
    "layer": "a set per layer",
    "universal": "one set for all",
}
COLOURS = {"zeroed": ORANGE, "refitted": BLUE, "slots": GREEN, "healed": PURPLE}


def plot_price(
    price: UniversalityPrice,
    axis: Any = None,
    *,
    margin: float | None = None,
    healed: Mapping[str, float] | None = None,
) -> Any:
    """Bars of the rise of the loss by scope and kind, on a logarithmic scale.

    Args:
        price: from ``price_of_universality``.
        axis: where to draw.
        margin: nats per token, drawn as a line.
        healed: rise after training, by scope, if known.
    """
    axis = new_axes(axis, (7, 4))
    scopes = [s for s in SHARED_BY if any(r["scope"] == s for r in price.rows)]
    kinds = list(dict.fromkeys(r["kind"] for r in price.rows)) + (["healed"] if healed else [])
    width = 0.8 / max(1, len(kinds))
    floor = 1e-3
    for i, kind in enumerate(kinds):
        places, heights, low, high = [], [], [], []
        for n, scope in enumerate(scopes):
            if kind == "healed":
                found: Any = (healed or {}).get(scope)
                row = None if found is None else {"rise": found, "interval": (found, found)}
            else:
                row = next(
                    (r for r in price.rows if (r["scope"], r["kind"]) == (scope, kind)), None
                )
            if row is None:
                continue
            places.append(n + (i - (len(kinds) - 1) / 2) * width)
            heights.append(max(row["rise"], floor))
            ends = np.nan_to_num(np.array(row["interval"]), posinf=row["rise"], neginf=row["rise"])
            low.append(heights[-1] - max(min(ends[0], heights[-1]), floor))
            high.append(max(ends[1], heights[-1]) - heights[-1])
        axis.bar(
            places, heights, width, yerr=[low, high], capsize=2, label=kind, color=COLOURS[kind]
        )
    if margin is not None:
        axis.axhline(margin, color="0.4", linewidth=1, linestyle="--", label=f"{margin:g} nats")
    axis.set_yscale("log")
    axis.set_xticks(range(len(scopes)), [SHARED_BY[s] for s in scopes])
    axis.set_ylabel("rise of the loss (nats per token)")
    axis.legend(fontsize=8)
    title(axis, f"{price.fraction:.0%} of the key dimensions cut")
    return axis


def plot_slots(
    moves: Mapping[str, Any], importance: Any, axes: Any = None, *, score: str = "fisher"
) -> Any:
    """The slots over the loudness of the pairs, and how many heads give which pair to which slot.

    Args:
        moves: from ``slot_moves``.
        importance: share of each pair in the gain of its head, ``[layer, pair]``.
        axes: two of them.
        score: the gain.
    """
    loud, below = new_panels(axes, 2, 1, (7, 7))
    own = 2 * np.pi / np.array(moves["own"])
    slots = 2 * np.pi / np.array(moves["slots"])
    shares = np.asarray(importance)
    loud.plot(own, shares.mean(0), color=BLUE, marker="o", markersize=3, label="mean over layers")
    loud.fill_between(own, shares.min(0), shares.max(0), color=BLUE, alpha=0.15, label="all layers")
    for number, slot in enumerate(slots):
        label = f"the {len(slots)} slots" if number == 0 else None
        loud.axvline(slot, color=ORANGE, linewidth=1, label=label)
    loud.set_xscale("log")
    loud.set_xlabel("wavelength of the rotary pair (tokens)")
    loud.set_ylabel(f"share of {score} gain")
    loud.legend(fontsize=7)
    image = below.imshow(
        np.array(moves["moves"]).T, aspect="auto", cmap=SEQUENTIAL, interpolation="nearest"
    )
    colour_bar(below, image, "heads")
    some = range(0, len(own), max(1, len(own) // 8))
    below.set_xticks(list(some), [f"{own[i]:,.0f}" for i in some], rotation=30)
    below.set_yticks(range(len(slots)), [f"{slot:,.0f}" for slot in slots], fontsize=7)
    below.set_xlabel("wavelength of the pair")
    below.set_ylabel("wavelength of its slot")
    return np.array([loud, below])
