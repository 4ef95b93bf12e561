"""All figures of the page, by name."""

from __future__ import annotations

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.probes.gains import KeyGains
from gainlens.report import figures_of_cuts as cuts
from gainlens.report import figures_of_maps as maps
from gainlens.report import figures_of_price as prices
from gainlens.report.figures import Damage
from gainlens.report.page import PageFigure
from gainlens.report.reach import FRACTION, Reach


def page_figures(
    gains: KeyGains,
    curve: SurgeryCurve,
    cmap: CoordinateMap,
    score: str,
    damage: Damage | None = None,
    reach: Reach | None = None,
) -> dict[str, PageFigure]:
    """Every figure that the results have the numbers for."""
    found = [
        cuts.surgery_figure(curve),
        maps.gains_figure(gains, score),
        maps.layers_figure(cmap, gains),
        maps.units_figure(cmap, gains),
        maps.presence_figure(cmap),
    ]
    if damage is not None:
        found += cuts.damage_figures(damage)
    if reach is not None and reach.by_position:
        found.append(cuts.position_figure(reach.by_position, FRACTION))
    if reach is not None and reach.by_distance is not None:
        found.append(cuts.distance_figure(reach.by_distance))
        found.append(cuts.distance_lines(reach.by_distance))
    if reach is not None and reach.price is not None and reach.price.rows:
        found.append(prices.price_figure(reach.price))
        if reach.price.slots is not None:
            found.append(prices.slots_figure(reach.price))
    if cmap.sinks is not None and len(cmap.sinks.layers):
        found.append(maps.sinks_figure(cmap))
    if cmap.sharing_cost is not None:
        found.append(maps.sharing_cost_figure(cmap))
    if cmap.red_line is not None:
        found.append(maps.red_line_figure(cmap))
    return {figure.name: figure for figure in found}
