"""Figures of the page on sharing: its price, and which pairs go into which slot."""

from __future__ import annotations

import numpy as np

from gainlens.analysis.map.universality import UniversalityPrice
from gainlens.plots.markup.charts import Frame, Series, bar_chart
from gainlens.plots.markup.marks import legend
from gainlens.plots.markup.scales import ColourScale
from gainlens.report.claims import FLAT_MARGIN
from gainlens.report.heat_figures import HeatAxes, HeatView, heat_figure
from gainlens.report.page import PageFigure, View, csv_of

EVERY = "all"
SHARED_BY = {"head": "each head", "layer": "each layer", "universal": "all heads"}
LOADED = 'gl.analysis.UniversalityPrice.load("report.json")'


def price_figure(price: UniversalityPrice) -> PageFigure:
    """Bars of the rise of the loss by what shares a set, for all texts together and for each."""
    kinds = list(dict.fromkeys(row["kind"] for row in price.rows))
    texts = list(dict.fromkeys(name for row in price.rows for name in row["by_text"]))
    alt = (
        "Bars: rise of the loss with a set per head, per layer and for all, zeroed, refitted and "
        "with slots."
    )
    frame = Frame(
        list(SHARED_BY.values()), "a set is shared by", "rise of the loss (nats per token)",
        "nats per token", FLAT_MARGIN, linear=0.1,
    )  # fmt: skip
    at = {(row["scope"], row["kind"]): row for row in price.rows}
    gap = (float("nan"), float("nan"))
    views, data = [], []
    for text in [EVERY, *(texts if len(texts) > 1 else [])]:
        series = []
        for kind in kinds:
            found = [at.get((scope, kind)) for scope in SHARED_BY]
            values = [
                float("nan") if row is None else {**row["by_text"], EVERY: row["rise"]}[text]
                for row in found
            ]
            ends = [
                gap if row is None or text != EVERY else tuple(map(float, row["interval"]))
                for row in found
            ]
            series.append(Series(kind, values, [(low, high) for low, high in ends]))
            data += [
                [text, kind, scope, value, *end]
                for scope, value, end in zip(SHARED_BY, values, ends, strict=True)
            ]
        drawn = bar_chart(series, frame, alt) + legend([s.name for s in series])
        views.append(View((text,) if len(texts) > 1 else (), drawn))
    return PageFigure(
        "price",
        alt,
        "Rise of the loss by what shares a set; bars are 95% intervals over documents.",
        tuple(views),
        {"text": [view.choice[0] for view in views]} if len(views) > 1 else {},
        csv_of(["text", "kind", "scope", "rise (nats per token)", "low", "high"], data),
        f"{LOADED}.plot()",
    )


def slots_figure(price: UniversalityPrice) -> PageFigure:
    """How many heads give which rotary pair to which slot."""
    assert price.slots is not None
    moves = np.array(price.slots["moves"], dtype=float)
    own, slots = (
        [f"{2 * np.pi / f:,.0f}" if f > 0 else "still" for f in price.slots[name]]
        for name in ("own", "slots")
    )
    loud = price.importance.mean(0)
    return heat_figure(
        "slots",
        [HeatView((), ColourScale("sequential", 0.0, float(moves.max()), unit="heads"), moves.T)],
        HeatAxes(
            [f"{n} ({w} tokens)" for n, w in enumerate(slots)],
            [f"{n}" for n in range(len(own))],
            row="slot",
            column="rotary pair",
            notes=[
                f"wavelength {w} tokens, {share:.1%} of the {price.score} gain"
                for w, share in zip(own, loud, strict=True)
            ],
        ),
        alt="Heat map of how many heads give each rotary pair to each slot; most move to a slot of "
        "nearly their wavelength.",
        caption="Heads that give a rotary pair to a slot; slots with their wavelengths, fast ones "
        "first.",
        python=f"{LOADED}.plot_slots()",
    )
