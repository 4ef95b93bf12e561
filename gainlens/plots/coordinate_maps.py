"""Figures of a coordinate map. Each takes the map and axes, and returns the axes it drew on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gainlens.plots.axes import (
    BLUE,
    DIVERGING,
    GREEN,
    ORANGE,
    SEQUENTIAL,
    SKY,
    VERMILION,
    colour_bar,
    new_axes,
    new_panels,
    reach,
    some,
    title,
    whole_numbers,
)

if TYPE_CHECKING:
    from gainlens.analysis.map.comparison import MapComparison
    from gainlens.analysis.map.coordinates import CoordinateMap


def plot_map(cmap: CoordinateMap, axes: Any = None) -> Any:
    """Four panels: cosine, cosine above the null, unit × layer map, rank plot.

    Args:
        cmap: the map.
        axes: four axes (by default a new figure), or one, for the unit × layer map only.

    Returns:
        The axes drawn on: an array of four, or the given one.

    Raises:
        InputError: the number of axes is neither four nor one.
    """
    axes = new_panels(axes, 2, 2, (13, 10))
    if len(axes) == 1:
        return plot_units(cmap, axes[0])
    if len(axes) != 4:
        from gainlens.errors import InputError

        raise InputError(f"ax holds {len(axes)} axes: expected four, or one")
    plot_cosine(cmap, axes[0])
    plot_above_null(cmap, axes[1])
    plot_units(cmap, axes[2])
    plot_ranks(cmap, axes[3])
    return axes


def plot_part(cmap: CoordinateMap, part: str, axes: Any = None) -> Any:
    """Plot one part of the map; see ``CoordinateMap.plot``."""
    parts = {
        "map": plot_map,
        "sinks": plot_sinks,
        "sharing_cost": plot_sharing_cost,
        "red_line": plot_red_line,
    }
    if part not in parts:
        from gainlens.errors import InputError

        raise InputError(f"part={part!r} is not one of {', '.join(parts)}")
    return parts[part](cmap, axes)


def plot_cosine(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Heat map of the cosine between layers, with its CV and null in the title."""
    axis = new_axes(axis, (6, 5))
    s = cmap.summary()
    image = axis.imshow(cmap.cosine, vmin=0, vmax=1, cmap=SEQUENTIAL)
    colour_bar(axis, image, "cosine")
    title(
        axis, f"cosine of gains {s['cosine']:.3f} (null {s['null_cosine']:.3f}, CV {s['cv']:.2f})"
    )
    return _layers(axis)


def plot_above_null(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Heat map of the cosine minus its mean under the deciding null.

    A dot means that the correlation after removing the profile is significant at 5%.
    """
    axis = new_axes(axis, (6, 5))
    above = cmap.cosine - cmap.tests[cmap.null]["cosine"].null_mean
    np.fill_diagonal(above, np.nan)
    width = max(0.05, reach(above))
    image = axis.imshow(above, vmin=-width, vmax=width, cmap=DIVERGING)
    colour_bar(axis, image, "cosine less its null")
    rows, columns = np.nonzero((cmap.p_values < 0.05) & ~np.eye(len(above), dtype=bool))
    # Scale the dots with the cells: fewer layers give larger cells.
    axis.scatter(columns, rows, s=min(16, max(2, 60 / len(above))), c="black", linewidths=0)
    share = cmap.summary()["pairs_above_null"]
    name = "shuffles of units" if cmap.null == "plain" else "shuffles that keep the profile"
    title(axis, f"above {name}: {share:.0%} of pairs significant (dots)")
    return _layers(axis)


def plot_units(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Units × layers: gain relative to the layer's mean, with wavelengths along the axis."""
    axis = new_axes(axis, (8, 5))
    mean = cmap.profiles.mean(1, keepdims=True)
    relative = np.divide(cmap.profiles, mean, out=np.zeros_like(cmap.profiles), where=mean > 0)
    image = axis.imshow(
        np.log2(np.clip(relative, 2**-3, 2**3)), aspect="auto", cmap=DIVERGING, vmin=-3, vmax=3
    )
    colour_bar(axis, image, "log2 of gain over the layer's mean")
    shown = some(len(cmap.units), 7)
    axis.set_xticks(shown, [_wave(cmap, u) for u in shown], fontsize=7)
    axis.set_ylabel("layer")
    rotates = bool((cmap.units.frequency > 0).any())
    axis.set_xlabel(f"{cmap.units.kind}" + (", with its wavelength in tokens" if rotates else ""))
    for u in cmap.universal_units:
        axis.annotate(
            "▼", (u, -0.5), color="black", ha="center", va="bottom", fontsize=6,
            annotation_clip=False,
        )  # fmt: skip
    title(axis, "gain of every unit in every layer (▼ universal)", pad=12)
    return whole_numbers(axis, "y")


def plot_ranks(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Chance-corrected presence of units in descending order, with chance level and threshold."""
    axis = new_axes(axis, (8, 5))
    table = cmap.universal.table()
    universal = set(cmap.universal_units)
    some_places = set(cmap.universal.beyond_chance)
    groups = {
        "universal: beyond chance and in most layers": (VERMILION, universal),
        "beyond chance": (ORANGE, some_places - universal),
        "no more than chance": ("0.7", {row["unit"] for row in table} - some_places - universal),
    }
    for label, (colour, members) in groups.items():
        at = [i for i, row in enumerate(table) if row["unit"] in members]
        if not at:
            continue
        heights = [table[i]["presence"] for i in at]
        axis.bar(at, heights, color=colour, label=f"{label} ({len(at)})")
    axis.axhline(0, color="black", lw=0.8)
    axis.axhline(
        cmap.universal.min_presence, color="black", ls="--", lw=1, label="bound for universal"
    )
    step = max(1, len(table) // 32)
    axis.set_xticks(
        range(0, len(table), step), [row["unit"] for row in table[::step]], fontsize=7, rotation=90
    )
    axis.set_xlabel(f"{cmap.units.kind}, by presence")
    axis.set_ylabel("presence (0 chance, 1 everywhere)")
    title(axis, f"{cmap.answer}: how present each {cmap.units.kind} is among the loudest")
    axis.legend(fontsize=7)
    return axis


def plot_sinks(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Sink units by layer: nats that each adds to the logit of the first position.

    Raises:
        InputError: the map has no sinks.
    """
    sinks = _part(cmap, "sinks")
    axis = new_axes(axis, (8, 5))
    shown = np.where(sinks.is_sink, sinks.advantage, 0).max(1)
    image = axis.imshow(np.ma.masked_less_equal(shown, 0), aspect="auto", cmap="magma_r", vmin=0)
    colour_bar(axis, image, "nats added to the first position's logit")
    ticks = some(len(cmap.units), 7)
    axis.set_xticks(ticks, [_wave(cmap, u) for u in ticks], fontsize=7)
    axis.set_xlabel(f"{cmap.units.kind}, with its wavelength in tokens")
    axis.set_ylabel("layer")
    same = sinks.persistence()
    title(
        axis,
        "units that carry the attention sink"
        + (f"; the same in another layer: {same:.0%}" if np.isfinite(same) else ""),
    )
    return whole_numbers(axis, "y")


def plot_red_line(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Red line: the layers that use each unit of the universal set, with the cost of patching it.

    Raises:
        InputError: the map has no red line.
    """
    line = _part(cmap, "red_line")
    axis = new_axes(axis, (9, 5))
    n_layers = len(cmap.cv)
    used = np.zeros((n_layers, len(line.details)))
    for column, row in enumerate(line.details):
        for layer, _ in row["used_by_heads"]:
            used[layer, column] += 1
    image = axis.imshow(used, aspect="auto", cmap=SEQUENTIAL, vmin=0)
    bar = colour_bar(axis, image, "key heads that use the unit")
    whole_numbers(bar.ax, "y")
    axis.set_xticks(
        range(len(line.details)),
        [_red_label(cmap, row) for row in line.details],
        fontsize=7,
        rotation=90,
    )
    costs = ": rise in nats when patched alone" if "patched_rise" in line.details[0] else ""
    axis.set_xlabel(f"{cmap.units.kind} (wavelength in tokens){costs}")
    axis.set_ylabel("layer")
    title(
        axis,
        f"red line at {line.margin:g} nats: {len(line.universal)} of {line.n_units} universal, "
        f"{len(line.per_layer[0])} with a set per layer",
    )
    return whole_numbers(axis, "y")


def plot_sharing_cost(cmap: CoordinateMap, axis: Any = None) -> Any:
    """Rise of the loss by scope at equal cut fractions, with intervals.

    Raises:
        InputError: the map has no sharing cost.
    """
    cost = _part(cmap, "sharing_cost")
    axis = new_axes(axis, (7, 4))
    kinds = {
        ("head", "quietest"): "a set per head",
        ("layer", "quietest"): "a set per layer",
        ("universal", "quietest"): "one universal set",
        ("universal", "random"): "random universal set",
    }
    width = 0.8 / len(kinds)
    colours = (BLUE, GREEN, SKY, ORANGE)
    hatches = ("", "", "", "//")
    for i, (kind, label) in enumerate(kinds.items()):
        # For random sets, use the first seed at each fraction.
        first = {r["fraction"]: r for r in cost.rows[::-1] if (r["scope"], r["order"]) == kind}
        rows = [first[f] for f in cost.fractions if f in first]
        at = np.arange(len(rows)) + (i - 1.5) * width
        rise = np.array([r["rise"] for r in rows])
        ends = np.array([r["interval"] for r in rows])
        bars = np.abs(ends - rise[:, None]).T if np.isfinite(ends).all() else None
        axis.bar(
            at, rise, width, yerr=bars, label=label, capsize=2, color=colours[i], hatch=hatches[i]
        )
    axis.set_xticks(range(len(cost.fractions)), [f"{f:.0%} cut" for f in cost.fractions])
    axis.set_xlabel("share of key dimensions cut (error bars: 95% intervals)")
    axis.set_ylabel("rise of the loss (nats per token)")
    axis.legend(fontsize=8)
    title(axis, "the cost of one index set")
    return axis


def plot_comparison(comparison: MapComparison, axes: Any = None) -> Any:
    """Three panels: layers of one map against the other, agreement by depth, presence by unit."""
    axes = new_panels(axes, 1, 3, (16, 4.5))
    c = comparison
    image = axes[0].imshow(c.centred, vmin=-1, vmax=1, cmap=DIVERGING, aspect="auto")
    colour_bar(axes[0], image, "centred cosine")
    axes[0].set(xlabel="layer of b", ylabel="layer of a")
    title(axes[0], f"{c.a.answer} → {c.b.answer}")
    axes[1].plot(c.same_depth, marker="o", ms=3)
    axes[1].axhline(c.null_high, color="0.5", ls="--", lw=1, label="95% of shuffles (mean)")
    axes[1].set(xlabel="layer of a", ylabel="correlation with b at equal depth")
    axes[1].legend(fontsize=8)
    first, second = c.a.universal.presence, c.b.universal.presence
    axes[2].scatter(first, second, s=12)
    for u in {*c.common, *c.gained, *c.lost}:
        axes[2].annotate(str(u), (first[u], second[u]), fontsize=7)
    axes[2].axline((0, 0), slope=1, color="0.7", lw=0.8)
    axes[2].set(xlabel="presence in a", ylabel="presence in b")
    title(
        axes[2], f"universal: {len(c.common)} in both, {len(c.gained)} gained, {len(c.lost)} lost"
    )
    return axes


def _part(cmap: CoordinateMap, name: str) -> Any:
    from gainlens.errors import InputError

    part = getattr(cmap, name)
    if part is None:
        raise InputError(f"this map has no {name} yet: with_evidence(model, …) measures it")
    return part


def _layers(axis: Any) -> Any:
    axis.set(xlabel="layer", ylabel="layer")
    return whole_numbers(axis, "x", "y")


def _wave(cmap: CoordinateMap, unit: int) -> str:
    wave = cmap.units.wavelength[unit]
    return str(unit) if wave is None else f"{unit}\n{_short(wave)}"


def _short(wavelength: float) -> str:
    return f"{wavelength:.3g}" if wavelength < 1000 else f"{wavelength / 1000:.3g}k"


def _red_label(cmap: CoordinateMap, row: dict[str, Any]) -> str:
    wave = "" if row["wavelength"] is None else f" ({_short(row['wavelength'])})"
    cost = f": {row['patched_rise']:+.3f}" if "patched_rise" in row else ""
    return f"{row['unit']}{wave}{cost}"
