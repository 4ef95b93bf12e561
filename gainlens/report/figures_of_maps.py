"""Figures of the page on gains and on what layers share."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.map.similarity import centred_rows, unit_length
from gainlens.analysis.map.units import Units, layer_profiles, unit_gains
from gainlens.errors import InputError
from gainlens.model.sites import STAGES
from gainlens.plots.markup.charts import Frame, Series, bar_chart
from gainlens.plots.markup.marks import legend
from gainlens.plots.markup.results import presence_chart
from gainlens.plots.markup.scales import ColourScale, number
from gainlens.probes.gains import KeyGains
from gainlens.report.heat_figures import HeatAxes, HeatView, heat_figure
from gainlens.report.page import PageFigure, View, csv_of

LOUD = ColourScale.around_one(8, "gain, as a multiple of the head's mean")
MAP = 'gl.CoordinateMap.load("map.safetensors")'


def gains_figure(gains: KeyGains, first: str) -> PageFigure:
    """Gain of each key dimension, for every score and stage, heads on request."""
    views = [
        HeatView(choice, LOUD, layer_profiles(x), _over_mean(x))
        for choice, x in _gains_by_choice(gains, first, "dim")
    ]
    layers, _, d_head = gains.shape
    partner = gains.model.partner.tolist()
    notes = [f"turns with {p}" if p != i else "does not turn" for i, p in enumerate(partner)]
    return heat_figure(
        "key_gains",
        views,
        HeatAxes(_numbers(layers), _numbers(d_head), column="key dimension", notes=notes),
        alt=f"Heat map of the gain ({first}) of each key dimension by layer, on a logarithmic "
        "scale; the numbers are in gains.safetensors.",
        caption="Gain of each key dimension, mean over key heads, each head scaled to mean 1.",
        python=f'gl.KeyGains.load("gains.safetensors").plot(score="{first}")',
        choices=("score", "stage"),
    )


def units_figure(cmap: CoordinateMap, gains: KeyGains) -> PageFigure:
    """Gain of every unit of the map in every layer, for every score and stage."""
    kind = cmap.units.kind
    views = [
        HeatView(choice, LOUD, layer_profiles(x), _over_mean(x))
        for choice, x in _gains_by_choice(gains, str(cmap.facts["score"]), kind)
    ]
    if not views:  # a map of something else than these gains
        mean = cmap.profiles.mean(1, keepdims=True)
        views = [HeatView(("", ""), LOUD, cmap.profiles / np.maximum(mean, 1e-30))]
    return heat_figure(
        "universal_units",
        views,
        _unit_axes(cmap.units, len(cmap.cv)),
        alt=f"Heat map of the gain of each {kind} by layer, relative to the layer's mean.",
        caption=f"Gain of every {kind} in every layer. Universal: "
        + (", ".join(map(str, cmap.universal_units)) or "none")
        + ".",
        python=f"{MAP}.plot()",
        choices=("score", "stage"),
    )


def layers_figure(cmap: CoordinateMap, gains: KeyGains) -> PageFigure:
    """What two layers have in common, by every measure, and the cosine of every gain."""
    own = f"{cmap.facts['score']}, {cmap.facts['stage']}"
    above = _off_diagonal(cmap.cosine - cmap.tests[cmap.null]["cosine"].null_mean)
    cosine = ColourScale("sequential", 0.0, 1.0, unit="cosine")
    signed = ColourScale("diverging", -1.0, 1.0, unit="correlation")
    views = [
        HeatView(("cosine", own), cosine, cmap.cosine),
        HeatView(
            ("cosine less its null", own),
            ColourScale.around_zero(above.ravel().tolist(), "cosine less its null", 0.05),
            above,
        ),
        HeatView(("correlation", own), signed, cmap.centred_cosine),
        HeatView(("correlation beyond frequency", own), signed, cmap.residual_correlation),
        HeatView(
            ("p-value of that", own),
            ColourScale("sequential", 1.0, 0.001, log=True, unit="corrected p-value"),
            cmap.p_values,
        ),
    ]
    for choice, x in _gains_by_choice(gains, str(cmap.facts["score"]), cmap.units.kind):
        named = ", ".join(choice)
        if named != own:
            profiles = layer_profiles(x)
            length, centred = unit_length(profiles), centred_rows(profiles)
            views.append(HeatView(("cosine", named), cosine, length @ length.T))
            views.append(HeatView(("correlation", named), signed, centred @ centred.T))
    numbers = _numbers(len(cmap.cv))
    return heat_figure(
        "layer_correlation",
        views,
        HeatAxes(numbers, numbers, column="other layer"),
        alt="Heat map, layer by layer: the cosine of gains; its mean is in the table below.",
        caption="What two layers have in common. A cosine of non-negative vectors is always high: "
        "read it with its null.",
        python=f"{MAP}.plot()",
        choices=("measure", "gain"),
    )


def presence_figure(cmap: CoordinateMap) -> PageFigure:
    """How present each unit is among the loudest."""
    table = cmap.universal.table()
    kind = cmap.units.kind
    alt = (
        f"Bars: each {kind} by how much more often than chance it is among the loudest; "
        f"{len(cmap.universal_units)} are universal."
    )
    head = list(table[0])
    return PageFigure(
        "unit_presence",
        alt,
        f"How present each {kind} is among the loudest.",
        (View((), presence_chart(cmap, alt)),),
        {},
        csv_of(head, [[row[name] for name in head] for row in table]),
        f'{MAP}.to_dataframe("units")',
    )


def sinks_figure(cmap: CoordinateMap) -> PageFigure:
    """Units that carry the attention sink."""
    sinks = cmap.sinks
    assert sinks is not None
    carried = np.where(sinks.is_sink, sinks.advantage, np.nan)
    most = np.where(sinks.is_sink, sinks.advantage, -np.inf).max(1)
    return heat_figure(
        "sinks",
        [
            HeatView(
                (),
                ColourScale.from_zero(carried.ravel().tolist(), "nats added to the first logit"),
                np.where(np.isfinite(most), most, np.nan),
                carried,
            )
        ],
        _unit_axes(cmap.units, len(sinks.mass)),
        alt="Heat map of the units that carry the sink in each layer, by the nats that they "
        "add to the logit of the first position.",
        caption="Units that carry the attention sink, by layer.",
        python=f'{MAP}.plot(part="sinks")',
    )


def red_line_figure(cmap: CoordinateMap) -> PageFigure:
    """Which layers use each unit of the universal set."""
    line = cmap.red_line
    assert line is not None
    heads = int(cmap.facts.get("n_heads", 0)) or 1
    used = np.zeros((len(cmap.cv), heads, len(line.details)))
    for column, row in enumerate(line.details):
        for layer, head in row["used_by_heads"]:
            used[layer, head, column] = 1
    notes = [
        _turns(row["wavelength"])
        + (f", patched alone {row['patched_rise']:+.4f} nats" if "patched_rise" in row else "")
        for row in line.details
    ]
    return heat_figure(
        "red_line",
        [
            HeatView(
                (),
                ColourScale("sequential", 0, heads, unit="key heads that use the unit"),
                used.sum(1),
                used,
            )
        ],
        HeatAxes(
            _numbers(len(cmap.cv)), [str(row["unit"]) for row in line.details],
            column=f"{cmap.units.kind}, loudest first", notes=notes,
        ),
        alt="Heat map of how many key heads of each layer use each unit of the universal set; "
        "the table below names the layers.",
        caption="The universal set, loudest first, and the layers that use each unit.",
        python=f'{MAP}.plot(part="red_line")',
    )  # fmt: skip


def sharing_cost_figure(cmap: CoordinateMap) -> PageFigure:
    """The cost of one index set per head, per layer, and for all."""
    cost = cmap.sharing_cost
    assert cost is not None
    kinds = {
        ("head", "quietest"): "a set per head",
        ("layer", "quietest"): "a set per layer",
        ("universal", "quietest"): "one universal set",
        ("universal", "random"): "random universal set (control)",
    }
    series = []
    for kind, name in kinds.items():
        # For random sets, the first seed at each fraction.
        at = {r["fraction"]: r for r in cost.rows[::-1] if (r["scope"], r["order"]) == kind}
        rows: list[dict[str, Any]] = [at.get(f, {}) for f in cost.fractions]
        gap = (float("nan"), float("nan"))
        values = [float(r.get("rise", "nan")) for r in rows]
        ends = [tuple(map(float, r.get("interval", gap))) for r in rows]
        series.append(Series(name, values, [(low, high) for low, high in ends]))
    alt = (
        "Bars: rise of the loss for a set per head, per layer, one universal set and a "
        "random universal set, at each cut."
    )
    frame = Frame(
        [f"{f:.0%}" for f in cost.fractions], "share of key dimensions cut",
        "rise of the loss (nats per token)", "nats per token",
    )  # fmt: skip
    head = ["scope", "order", "score", "seed", "fraction", "rise", "low", "high"]
    return PageFigure(
        "sharing_cost",
        alt,
        "Rise of the loss by scope; bars are 95% intervals over documents.",
        (View((), bar_chart(series, frame, alt) + legend([s.name for s in series])),),
        {},
        csv_of(head, [[*(r[k] for k in head[:6]), *r["interval"]] for r in cost.rows]),
        f'{MAP}.plot(part="sharing_cost")',
    )


def _gains_by_choice(
    gains: KeyGains, first: str, unit: str
) -> list[tuple[tuple[str, str], Float[np.ndarray, "layer kv_head unit"]]]:
    """Gains by score and stage, those of ``first`` after the rotation before all others."""
    found: list[tuple[tuple[str, str], Float[np.ndarray, "layer kv_head unit"]]] = []
    rotates = bool(gains.model.rotary_dim)
    if unit not in ("dim", "pair"):
        return []
    for score in sorted(gains.scores, key=lambda name: name != first):
        for stage in STAGES[::-1] if rotates else ("projected",):
            try:
                found.append(((score, stage), unit_gains(gains, score, stage, unit)[0]))
            except InputError:  # a score of logits has no stage before the rotation
                continue
    return found


def _over_mean(
    x: Float[np.ndarray, "layer kv_head unit"],
) -> Float[np.ndarray, "layer kv_head unit"]:
    mean = x.mean(-1, keepdims=True)
    scaled: Float[np.ndarray, "layer kv_head unit"] = np.divide(
        x, mean, out=np.zeros_like(x), where=mean > 0
    )
    return scaled


def _unit_axes(units: Units, layers: int) -> HeatAxes:
    return HeatAxes(
        _numbers(layers),
        _numbers(len(units)),
        column=units.kind,
        notes=[_turns(wave) for wave in units.wavelength],
    )


def _turns(wavelength: float | None) -> str:
    return "" if wavelength is None else f"wavelength {number(wavelength)} tokens"


def _off_diagonal(x: Float[np.ndarray, "layer other"]) -> Float[np.ndarray, "layer other"]:
    y = np.array(x)
    np.fill_diagonal(y, np.nan)
    return y


def _numbers(n: int) -> list[str]:
    return [str(i) for i in range(n)]
