"""Drawings of results as inline SVG, for the report page and for notebooks.

Results are known by their fields, as in the rest of ``gainlens.plots``. Lines and bars say their
values when pointed at; heat maps do where ``said`` is given.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from gainlens.plots.markup.charts import Frame, Series, bar_chart, line_chart
from gainlens.plots.markup.heat_map import heat_map
from gainlens.plots.markup.marks import legend
from gainlens.plots.markup.scales import ColourScale

if TYPE_CHECKING:
    from gainlens.analysis.behaviour_curves import Behaviours
    from gainlens.analysis.damage_by_distance import DistanceChange
    from gainlens.analysis.damage_by_position import PositionRise
    from gainlens.analysis.map.coordinates import CoordinateMap
    from gainlens.analysis.patch_effects import PatchEffects
    from gainlens.analysis.sweep.curve import SurgeryCurve
    from gainlens.probes.gains import KeyGains

NATS = "nats per token"
RISE = f"rise of the loss ({NATS})"


def surgery_lines(curve: SurgeryCurve) -> list[Series]:
    """A line per order, score and scope; seeds of a control are averaged."""
    groups: dict[str, list[int]] = {}
    for i, point in enumerate(curve.points):
        name = {
            "given": str(point.label),
            "random": "random pairs (control)",
            "loudest": "loudest pairs (control)",
        }.get(point.order, f"{point.order} pairs, {point.score}, {point.scope}")
        groups.setdefault(name, []).append(i)
    found = []
    for name, members in groups.items():
        fractions = sorted({curve.points[i].fraction for i in members})
        means = [
            curve.mean_and_interval([i for i in members if curve.points[i].fraction == f])
            for f in fractions
        ]
        found.append(Series(name, [m[0] for m in means], [(m[1], m[2]) for m in means], fractions))
    return found


def surgery_chart(curve: SurgeryCurve, margin: float, alt: str) -> str:
    """Rise of the loss over the share cut, with the margin."""
    lines = surgery_lines(curve)
    places = sorted({f for line in lines for f in line.at})
    labels = [f"{f:.0%}" for f in places]
    frame = Frame(labels, "share of key dimensions cut", RISE, NATS, margin, linear=0.1)
    drawn = line_chart([_on(line, places) for line in lines], frame, alt)
    return drawn + legend([line.name for line in lines], f"margin {margin:g} nats")


def _on(line: Series, places: Sequence[float]) -> Series:
    """The same line with a value, or none, at each of the places."""
    at = {f: i for i, f in enumerate(line.at)}
    gap = (float("nan"), float("nan"))
    return Series(
        line.name,
        [line.values[at[f]] if f in at else float("nan") for f in places],
        [line.intervals[at[f]] if f in at else gap for f in places],
        list(places),
    )


def position_chart(rise: PositionRise, alt: str) -> str:
    """Rise of the loss over buckets of positions, a line per cut."""
    rows = rise.table()
    lines = []
    for cut in rise.cuts:
        own = [r for r in rows if r["cut"] == cut]
        ends = [(float(r["interval"][0]), float(r["interval"][1])) for r in own]
        lines.append(Series(cut, [float(r["rise"]) for r in own], ends))
    frame = Frame(_spans(rise.buckets), "position in the text (tokens)", RISE, NATS)
    return line_chart(lines, frame, alt) + legend(rise.cuts)


def distance_charts(change: DistanceChange, alt: str) -> tuple[str, str]:
    """Change of attention by distance, and the share of pairs cut at each wavelength."""
    rows = change.table()
    columns = _spans(change.buckets)
    lines, shares = [], []
    for cut in change.cuts:
        own = [r for r in rows if r["cut"] == cut]
        ends = [(float(r["interval"][0]), float(r["interval"][1])) for r in own]
        lines.append(Series(cut, [r["change"] for r in own], ends))
        shares.append(
            Series(cut, [100 * r["cut_pairs"] / r["pairs"] if r["pairs"] else 0.0 for r in own])
        )
    key = legend(change.cuts)
    across = "distance from query to key (tokens)"
    drawn = line_chart(lines, Frame(columns, across, "change of attention", "of attention"), alt)
    words = "Bars: share of the rotary pairs with each wavelength that the cut takes from."
    frame = Frame(columns, "wavelength of the pair (tokens)", "pairs cut (%)", "% of the pairs")
    return drawn + key, bar_chart(shares, frame, words) + key


def gains_map(gains: KeyGains, score: str, alt: str) -> str:
    """Gain of each key dimension by layer, mean over key heads; each head is scaled to mean 1."""
    values = gains.score(score).numpy().astype(np.float64)
    scaled = values / np.maximum(values.mean(-1, keepdims=True), 1e-30)
    scale = ColourScale.around_one(8, f"gain ({score}), as a multiple of the head's mean")
    return _map(scaled.mean(1), scale, "key dimension", alt)


def kept_map(keep: Bool[np.ndarray, "layer kv_head d_head"], alt: str) -> str:
    """Share of a layer's key heads that keep each dimension."""
    scale = ColourScale("sequential", 0.0, 1.0, unit="share of the key heads that keep it")
    return _map(keep.mean(1), scale, "key dimension", alt)


def patching_map(effects: PatchEffects, alt: str) -> str:
    """Effect of each unit; a row per layer and key head."""
    layers, heads, units = effects.effect.shape
    table = effects.effect.reshape(layers * heads, units)
    scale = ColourScale.around_zero(table.ravel().tolist(), "change of the metric (its own units)")
    rows = [f"{row // heads}.{row % heads}" for row in range(layers * heads)]
    return heat_map(
        table, scale, rows, _numbers(units), "layer.key head", effects.unit, alt, said=True
    )


def map_panels(cmap: CoordinateMap, alt: str) -> str:
    """Cosine between layers, what is left above its null, gain and presence of every unit."""
    above = np.array(cmap.cosine - cmap.tests[cmap.null]["cosine"].null_mean)
    np.fill_diagonal(above, np.nan)
    mean = cmap.profiles.mean(1, keepdims=True)
    signed = ColourScale.around_zero(above.ravel().tolist(), "cosine less its null", 0.05)
    cosine = ColourScale("sequential", 0.0, 1.0, unit="cosine")
    panels = [
        _map(cmap.cosine, cosine, "other layer", "Heat map: cosines between layers."),
        _map(above, signed, "other layer", "Heat map: the same cosines less their null."),
        _map(
            cmap.profiles / np.maximum(mean, 1e-30),
            ColourScale.around_one(8, "gain, as a multiple of the layer's mean"),
            cmap.units.kind,
            f"Heat map: gain of each {cmap.units.kind} by layer.",
        ),
        presence_chart(cmap, f"Bars: how present each {cmap.units.kind} is among the loudest."),
    ]
    words = f' role="group" aria-label="{html.escape(alt)}"'
    return f'<div class="panels"{words}>{"".join(panels)}</div>'


def presence_chart(cmap: CoordinateMap, alt: str) -> str:
    """How much more often than chance each unit is among the loudest."""
    table = cmap.universal.table()
    universal, beyond = set(cmap.universal_units), set(cmap.universal.beyond_chance)

    def only(members: set[int]) -> list[float]:
        return [r["presence"] if r["unit"] in members else float("nan") for r in table]

    groups = [
        Series("universal: beyond chance and in most layers", only(universal)),
        Series("beyond chance", only(beyond - universal)),
        Series("no more than chance", only({r["unit"] for r in table} - universal - beyond)),
    ]
    frame = Frame(
        [str(r["unit"]) for r in table], f"{cmap.units.kind}, by presence",
        "presence (0 chance, 1 everywhere)", "", cmap.universal.min_presence,
    )  # fmt: skip
    key = legend([g.name for g in groups], "bound for universal")
    return f"<div>{bar_chart(groups, frame, alt, together=True)}{key}</div>"


def behaviour_panels(result: Behaviours, alt: str) -> str:
    """A panel per behaviour against the share cut; the dashed line is chance."""
    kinds = list(dict.fromkeys((r.behaviour, r.distance) for r in result.rows))
    names = list(dict.fromkeys(r.label or r.order for r in result.rows if r.order != "intact"))
    panels = []
    for behaviour, distance in kinds:
        rows = result.find(behaviour=behaviour, distance=distance)
        intact = [r for r in rows if r.order == "intact"]
        places = sorted({r.fraction for r in rows})
        lines = []
        for name in names:
            own = [*intact, *(r for r in rows if (r.label or r.order) == name)]
            own.sort(key=lambda r: r.fraction)
            ends = [(r.value - 2 * r.standard_error, r.value + 2 * r.standard_error) for r in own]
            at = [r.fraction for r in own]
            lines.append(_on(Series(name, [r.value for r in own], ends, at), places))
        nats = behaviour in ("kl", "loss")
        title = behaviour + (f", {distance} back" if distance else "")
        frame = Frame(
            [f"{f:.0%}" for f in places], "share cut", NATS if nats else "share right",
            NATS if nats else "", rows[0].chance, title=title,
        )  # fmt: skip
        panels.append(line_chart(lines, frame, f"Lines: {title} against the share cut."))
    words = f' role="group" aria-label="{html.escape(alt)}"'
    return f'<div class="panels"{words}>{"".join(panels)}</div>' + legend(names, "chance")


def _map(
    values: Float[np.ndarray, "layer column"], scale: ColourScale, column: str, alt: str
) -> str:
    layers, columns = values.shape
    return heat_map(
        values, scale, _numbers(layers), _numbers(columns), "layer", column, alt, said=True
    )


def _spans(buckets: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{a:,}" if a == b else f"{a:,}–{b:,}" for a, b in buckets]


def _numbers(n: int) -> list[str]:
    return [str(i) for i in range(n)]
