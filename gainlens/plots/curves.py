"""Figures of a surgery: damage by fraction, place, position and distance, patching, behaviours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gainlens.plots.axes import (
    CYCLE,
    DIVERGING,
    MARKERS,
    ORANGE,
    VERMILION,
    colour_bar,
    new_axes,
    new_panels,
    reach,
    readable_on,
    title,
    whole_numbers,
)

if TYPE_CHECKING:
    from gainlens.analysis.behaviour_curves import Behaviours
    from gainlens.analysis.damage_by_distance import DistanceChange
    from gainlens.analysis.damage_by_position import PositionRise
    from gainlens.analysis.patch_effects import PatchEffects
    from gainlens.analysis.sweep.curve import SurgeryCurve

CONTROLS = {"random": (ORANGE, "s"), "loudest": (VERMILION, "^")}
"""The style of controls, the same in every figure."""


def plot_surgery(curve: SurgeryCurve, ax: Any | None = None, margin: float | None = None) -> Any:
    """Rise of the loss over the fraction cut, one line per order, score and scope.

    Args:
        curve: the sweep.
        ax: matplotlib axes to draw into; new ones by default.
        margin: drawn as a dashed line, in nats per token.

    Returns:
        The axes.
    """
    ax = new_axes(ax, (8, 4.6))
    scopes = {p.scope for p in curve.points if p.order == "random"}
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(curve.points):
        # All seeds of a random control are averaged into one line.
        if p.order == "random":
            name = f"random, {p.scope} (control)" if len(scopes) > 1 else "random (control)"
        elif p.order == "given":
            name = str(p.label)
        else:
            control = "" if p.order == "quietest" else " (control)"
            name = f"{p.order}{control}, {p.score}, {p.scope}"
        groups.setdefault(name, []).append(i)
    styles = iter(zip(CYCLE * len(groups), MARKERS * len(groups), strict=True))
    fixed: dict[str, tuple[str, str]] = dict(CONTROLS)
    for name, points in groups.items():
        fractions = sorted({curve.points[i].fraction for i in points})
        at = [[i for i in points if curve.points[i].fraction == f] for f in fractions]
        values = np.array([curve.mean_and_interval(part) for part in at])
        bars = np.abs(values[:, 1:] - values[:, :1]).T
        order = curve.points[points[0]].order
        colour, marker = fixed.pop(order) if order in fixed else next(styles)
        ax.errorbar(
            [100 * f for f in fractions],
            values[:, 0],
            yerr=np.where(np.isfinite(bars), bars, 0),
            marker=marker,
            color=colour,
            capsize=3,
            label=name,
        )
    ax.axhline(0, color="black", linewidth=0.8)
    if margin is not None:
        ax.axhline(margin, color="black", linestyle="--", linewidth=0.8, label=f"margin {margin:g}")
    ran = sorted({100 * p.fraction for p in curve.points})
    if len(ran) == 1:
        ax.set_xticks(ran)  # a single fraction needs no scale
    ax.set_xlabel("share of key dimensions cut (%)")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_yscale("symlog", linthresh=0.1)
    title(
        ax,
        f"what cutting key dimensions costs ({curve.n_documents} documents, bars: 95% intervals)",
    )
    ax.legend(fontsize=8)
    return ax


def plot_damage(
    damage: Float[np.ndarray, "layer kv_head"], ax: Any | None = None, label: str = ""
) -> Any:
    """Heat map of the rise of the loss when a single key head of one layer is cut.

    Args:
        damage: nats per token; see ``gainlens.analysis.damage_by_place.damage_by_head``.
        ax: axes to draw into.
        label: title.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    end = reach(damage)
    image = ax.imshow(damage, aspect="auto", cmap=DIVERGING, vmin=-end, vmax=end)
    colour_bar(ax, image, "rise of the loss (nats per token)")
    ax.set_xlabel("key head")
    ax.set_ylabel("layer")
    title(ax, label)
    return whole_numbers(ax, "x", "y")


def plot_damage_by_layer(
    damage: Float[np.ndarray, "layer part"], ax: Any | None = None, label: str = ""
) -> Any:
    """Bar chart of the rise of the loss when a single layer is cut.

    Args:
        damage: nats per token; ``damage_by_head(…, by="layer")``.
        ax: axes to draw into.
        label: title.
    """
    ax = new_axes(ax)
    ax.bar(range(len(damage)), damage[:, 0], color=CYCLE[0], label="all key heads of the layer")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlabel("layer")
    ax.set_ylabel("rise of the loss (nats per token)")
    title(ax, label)
    ax.legend(fontsize=8)
    return whole_numbers(ax, "x")


def plot_scores(curve: SurgeryCurve, ax: Any | None = None, order: str = "quietest") -> Any:
    """Table of scores and scopes × fractions; each cell is the rise of the loss in nats.

    Args:
        curve: a sweep over several scores or scopes.
        ax: axes to draw into.
        order: the order whose points are shown.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    rows = [r for r in curve.table() if r["order"] == order]
    names = list(dict.fromkeys((r["score"], r["scope"]) for r in rows))
    fractions = sorted({r["fraction"] for r in rows})
    cells = np.full((len(names), len(fractions)), np.nan)
    for row in rows:
        place = names.index((row["score"], row["scope"])), fractions.index(row["fraction"])
        cells[place] = row["delta"]
    shown = np.log10(np.maximum(np.nan_to_num(cells, nan=1e-3), 1e-3))
    image = ax.imshow(shown, aspect="auto", cmap="viridis_r")
    colour_bar(ax, image, "log10 of the rise (nats per token)")
    for (y, x), value in np.ndenumerate(cells):
        if np.isfinite(value):
            colour = readable_on(image, shown[y, x])
            ax.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(fractions)), [f"{f:.0%}" for f in fractions])
    ax.set_yticks(range(len(names)), [f"{score}, {scope}" for score, scope in names])
    ax.set_xlabel("share of key dimensions cut")
    ax.set_ylabel("gain that ranks, scope")
    title(ax, "rise of the loss (nats per token)")
    return ax


def plot_patching(effects: PatchEffects, ax: Any | None = None) -> Any:
    """Heat map of patching effects, layers and key heads down, units across.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    layers, heads, units = effects.effect.shape
    table = effects.effect.reshape(layers * heads, units)
    end = reach(table)
    image = ax.imshow(table, aspect="auto", cmap=DIVERGING, vmin=-end, vmax=end)
    colour_bar(ax, image, "change of the metric (its own units)")
    step = max(1, layers // 10)
    ax.set_yticks([layer * heads for layer in range(0, layers, step)], range(0, layers, step))
    ax.set_ylabel(f"layer ({heads} key heads each)")
    ax.set_xlabel(f"{effects.unit} (index in the head)")
    title(ax, f"{effects.method}: clean keys in the corrupted run")
    return whole_numbers(ax, "x")


def plot_behaviours(result: Behaviours, axes: Any | None = None) -> Any:
    """One panel per behaviour against the fraction cut; the dashed line is chance.

    Returns:
        An array of axes.
    """
    kinds = list(dict.fromkeys((r.behaviour, r.distance) for r in result.rows))
    axes = new_panels(axes, 1, len(kinds), (3.2 * len(kinds), 3))
    for ax, (behaviour, distance) in zip(axes, kinds, strict=True):
        rows = result.find(behaviour=behaviour, distance=distance)
        intact = [r for r in rows if r.order == "intact"]
        styles = iter(zip(CYCLE * len(rows), MARKERS * len(rows), strict=True))
        for name in dict.fromkeys(r.label or r.order for r in rows if r.order != "intact"):
            line = sorted(
                intact + [r for r in rows if (r.label or r.order) == name],
                key=lambda r: r.fraction,
            )
            colour, marker = CONTROLS.get(name) or next(styles)
            ax.errorbar(
                [100 * r.fraction for r in line],
                [r.value for r in line],
                yerr=[2 * r.standard_error for r in line],
                marker=marker,
                color=colour,
                capsize=3,
                label=f"{name} (control)" if name in CONTROLS else name,
            )
        ax.axhline(rows[0].chance, color="black", linestyle="--", linewidth=0.8, label="chance")
        title(ax, behaviour + (f", {distance} back" if distance else ""))
        ax.set_xlabel("share cut (%)")
        ax.set_ylabel("nats per token" if behaviour in ("kl", "loss") else "share right")
    axes[0].legend(fontsize=8)
    return axes


def plot_rise_by_position(result: PositionRise, ax: Any | None = None) -> Any:
    """Rise of the loss over buckets of positions, one line per cut.

    Args:
        result: see ``gainlens.analysis.damage_by_position``.
        ax: matplotlib axes to draw into; new ones by default.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    rows = result.table()
    _lines(ax, result, rows, "rise")
    counts = [r["n_documents"] for r in rows if r["cut"] == result.cuts[0]]
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlabel("position in the text (tokens)")
    ax.set_ylabel("rise of the loss (nats per token)")
    least, most = min(counts), max(counts)
    documents = f"{most}" if least == most else f"{least} to {most}"
    title(ax, f"rise of the loss by position ({documents} documents, bars: 95% intervals)")
    ax.legend(fontsize=8)
    return ax


def plot_change_by_distance(result: DistanceChange, ax: Any | None = None) -> Any:
    """Change of attention over buckets of distance, one line per cut; in the background the share
    of the rotary pairs with a wavelength in the bucket that the cut takes from.

    Args:
        result: see ``gainlens.analysis.damage_by_distance``.
        ax: matplotlib axes to draw into; new ones by default.

    Returns:
        The axes.
    """
    ax = new_axes(ax)
    rows = result.table()
    colours = _lines(ax, result, rows, "change")
    ax.set_xlabel("distance from query to key, wavelength of pairs (tokens)")
    ax.set_ylabel("absolute change of attention (lines)")
    ax.set_ylim(bottom=0)
    shares = ax.twinx()
    width = 0.8 / len(result.cuts)
    for c, (name, colour) in enumerate(zip(result.cuts, colours, strict=True)):
        counts = [(r["cut_pairs"], r["pairs"]) for r in rows if r["cut"] == name]
        longer = result.wavelengths >= result.buckets[-1][1] + 1
        counts.append((result.cut_pairs[c, longer].sum(), result.pairs[longer].sum()))
        share = [100 * cut / pairs if pairs else 0.0 for cut, pairs in counts]
        at = np.arange(len(counts)) + (c - (len(result.cuts) - 1) / 2) * width
        shares.bar(at, share, width, color=colour, alpha=0.2)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    ax.set_xticks(range(len(labels) + 1), [*labels, "longer"], rotation=30)
    shares.set_ylim(0, 100)
    shares.set_ylabel("pairs of that wavelength cut (%, bars)")
    title(ax, "which distances the cut damages")
    ax.legend(fontsize=8)
    return ax


def _lines(
    ax: Any, result: PositionRise | DistanceChange, rows: list[dict[str, Any]], value: str
) -> list[str]:
    """A line with intervals per cut over the buckets of a table; the colours."""
    colours = []
    for c, name in enumerate(result.cuts):
        own = [r for r in rows if r["cut"] == name]
        means = np.array([r[value] for r in own])
        bars = np.abs(np.array([r["interval"] for r in own]) - means[:, None]).T
        colours.append(CYCLE[c % len(CYCLE)])
        ax.errorbar(
            np.arange(len(own)) + 0.06 * (c - (len(result.cuts) - 1) / 2),
            means,
            yerr=np.where(np.isfinite(bars), bars, 0),
            marker=MARKERS[c % len(MARKERS)],
            color=colours[-1],
            capsize=3,
            label=f"{name} ({result.fractions[c]:.0%} cut)",
        )
    places = [str(a) if a == b else f"{a}–{b}" for a, b in result.buckets]
    ax.set_xticks(range(len(places)), places, rotation=30 if len(places) > 6 else 0)
    return colours
