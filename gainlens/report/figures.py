"""The figures of the report folder, one PNG file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.plots import coordinate_maps
from gainlens.plots.basics import plot_gains
from gainlens.plots.curves import (
    plot_change_by_distance,
    plot_damage,
    plot_damage_by_layer,
    plot_rise_by_position,
    plot_surgery,
)
from gainlens.plots.universality import plot_price
from gainlens.probes.gains import KeyGains
from gainlens.report.claims import FLAT_MARGIN
from gainlens.report.reach import Reach

SIZE = (4.8, 3.8)
"""Inches; small enough that the text is readable on a phone."""
DPI = 190
DAMAGE_FRACTION = 0.5


@dataclass(frozen=True)
class Damage:
    """The cost of cutting only one layer or only one key head.

    Attributes:
        by_layer, by_head: rise of the loss, nats per token.
        n_documents, length: size of the validation text.
    """

    by_layer: Float[np.ndarray, "layer one"]
    by_head: Float[np.ndarray, "layer kv_head"]
    n_documents: int
    length: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fraction": DAMAGE_FRACTION,
            "by_layer": self.by_layer[:, 0].tolist(),
            "by_head": self.by_head.tolist(),
            "n_documents": self.n_documents,
            "length": self.length,
        }


def draw_figures(
    folder: Path,
    gains: KeyGains,
    curve: SurgeryCurve,
    cmap: CoordinateMap,
    score: str,
    damage: Damage | None = None,
    reach: Reach | None = None,
) -> dict[str, Path]:
    """Write every figure as a PNG file; returns the paths by name."""
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[[Any], Any]] = {
        "key_gains": lambda ax: plot_gains(gains, ax, score),
        "surgery_impact": lambda ax: plot_surgery(curve, ax, FLAT_MARGIN),
        "layer_correlation": lambda ax: coordinate_maps.plot_cosine(cmap, ax),
        "layer_correlation_above_null": lambda ax: coordinate_maps.plot_above_null(cmap, ax),
        "universal_units": lambda ax: coordinate_maps.plot_units(cmap, ax),
        "unit_presence": lambda ax: coordinate_maps.plot_ranks(cmap, ax),
    }
    if damage is not None:
        title = f"{DAMAGE_FRACTION:.0%} cut in one {{}} alone"
        drawings["damage_by_layer"] = lambda ax: plot_damage_by_layer(
            damage.by_layer, ax, title.format("layer")
        )
        drawings["damage_by_head"] = lambda ax: plot_damage(
            damage.by_head, ax, title.format("key head")
        )
    if reach is not None and reach.by_distance is not None:
        drawings["change_by_distance"] = partial(plot_change_by_distance, reach.by_distance)
    if reach is not None and reach.price is not None and reach.price.rows:
        drawings["price"] = partial(plot_price, reach.price, margin=FLAT_MARGIN)
    if cmap.sinks is not None and len(cmap.sinks.layers):
        drawings["sinks"] = lambda ax: coordinate_maps.plot_sinks(cmap, ax)
    if cmap.sharing_cost is not None:
        drawings["sharing_cost"] = lambda ax: coordinate_maps.plot_sharing_cost(cmap, ax)
    if cmap.red_line is not None:
        drawings["red_line"] = lambda ax: coordinate_maps.plot_red_line(cmap, ax)
    paths = {}
    for name, draw in drawings.items():
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        paths[name] = folder / f"{name}.png"
        figure.savefig(paths[name], dpi=DPI)
    if reach is not None and reach.by_position:
        n = len(reach.by_position)
        figure = Figure(figsize=(SIZE[0] + 3.4 * (n - 1), SIZE[1]), layout="constrained")
        panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
        for panel, (name, rise) in zip(panels, reach.by_position.items(), strict=True):
            plot_rise_by_position(rise, panel)
            panel.axhline(FLAT_MARGIN, color="0.4", linewidth=1, linestyle="--")
            panel.set_title(name, fontsize=9)
            panel.label_outer()
        paths["rise_by_position"] = folder / "rise_by_position.png"
        figure.savefig(paths["rise_by_position"], dpi=DPI)
    if reach is not None and reach.price is not None and reach.price.slots is not None:
        figure = Figure(figsize=(SIZE[0], 1.6 * SIZE[1]), layout="constrained")
        price = reach.price
        axes = figure.subplots(2, 1, height_ratios=(1, 1.6))
        price.plot_slots(axes)
        paths["slots"] = folder / "slots.png"
        figure.savefig(paths["slots"], dpi=DPI)
    return paths
