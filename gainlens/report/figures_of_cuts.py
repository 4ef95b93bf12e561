"""Figures of the page on what cuts cost: by fraction, place, position, text and distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gainlens.analysis.damage_by_distance import DistanceChange
from gainlens.analysis.damage_by_position import PositionRise
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.plots.markup.charts import Frame, Series, all_values, bar_chart, line_chart
from gainlens.plots.markup.marks import legend
from gainlens.plots.markup.results import NATS, RISE, distance_charts, surgery_chart, surgery_lines
from gainlens.plots.markup.scales import ColourScale
from gainlens.report.claims import FLAT_MARGIN
from gainlens.report.figures import DAMAGE_FRACTION, Damage
from gainlens.report.heat_figures import HeatAxes, HeatView, heat_figure
from gainlens.report.page import PageFigure, View, csv_of

EVERY = "all"
MARGIN = f"margin {FLAT_MARGIN:g} nats"


def surgery_figure(curve: SurgeryCurve) -> PageFigure:
    """Rise of the loss over the share cut, for all texts together and for each."""
    texts = list(dict.fromkeys(curve.domains))
    views, rows = [], []
    for text in [EVERY, *(texts if len(texts) > 1 else [])]:
        part = curve if text == EVERY else _of_text(curve, text)
        alt = (
            "Lines: rise of the loss against the share of key dimensions cut, for the quietest "
            f"pairs and their controls, on {text} texts; the table below has the numbers."
        )
        for line in surgery_lines(part):
            rows += [
                [text, line.name, at, value, *ends]
                for at, value, ends in zip(line.at, line.values, line.intervals, strict=True)
            ]
        views.append(View((text,), surgery_chart(part, FLAT_MARGIN, alt)))
    return PageFigure(
        "surgery_impact",
        "Rise of the loss against the share of key dimensions cut, for the quietest pairs, random "
        "pairs and the loudest pairs; the table below has the numbers.",
        "Rise of the loss against the share of key dimensions cut; bars are 95% intervals over "
        "documents.",
        tuple(views),
        {"text": [view.choice[0] for view in views]} if len(views) > 1 else {},
        csv_of(["text", "cut", "fraction", "rise (nats per token)", "low", "high"], rows),
        f'gl.SurgeryCurve.load("surgery.json").plot(margin={FLAT_MARGIN:g})',
    )


def _of_text(curve: SurgeryCurve, text: str) -> SurgeryCurve:
    """The curve of the documents of one text."""
    own = [i for i, domain in enumerate(curve.domains) if domain == text]
    lengths = tuple(curve.lengths[i] for i in own) if curve.lengths else ()
    return replace(
        curve,
        losses=curve.losses[:, own],
        baseline=curve.baseline[own],
        domains=(text,) * len(own),
        groups=tuple(curve.groups[i] for i in own) if curve.groups else (),
        lengths=lengths,
        n_tokens=sum(lengths) or curve.n_tokens,
    )


def position_figure(by_position: Mapping[str, PositionRise], fraction: float) -> PageFigure:
    """Rise by position: a panel per text; one text; or all texts at some positions."""
    tables = {text: rise.table() for text, rise in by_position.items()}
    cuts = list(dict.fromkeys(cut for rise in by_position.values() for cut in rise.cuts))
    spans = sorted({(r["first"], r["last"]) for rows in tables.values() for r in rows})
    # A text with shorter documents ends its last bucket earlier: the same bucket by its start.
    starts = sorted({first for first, _ in spans})
    label = {s: f"{s:,}–{max(last for first, last in spans if first == s):,}" for s in starts}
    alt = (
        "Lines: rise of the loss against the position in the text, for {}; the table under "
        "'Position and distance' has the numbers."
    )
    key = legend(cuts, MARGIN)

    lines = {
        text: [
            Series(
                cut,
                [_value(table, cut, s)[0] for s in starts],
                [_value(table, cut, s)[1] for s in starts],
            )
            for cut in cuts
        ]
        for text, table in tables.items()
    }
    reach = [value for series in lines.values() for value in all_values(series)]

    def by_start(text: str, ends: Sequence[float]) -> str:
        frame = Frame(
            [label[s] for s in starts], "position in the text (tokens)", RISE, NATS, FLAT_MARGIN,
            title=text, reach=ends,
        )  # fmt: skip
        return line_chart(lines[text], frame, alt.format(text))

    def by_text(start: int, texts: Sequence[str]) -> str:
        bars = [
            Series(
                cut,
                [_value(tables[t], cut, start)[0] for t in texts],
                [_value(tables[t], cut, start)[1] for t in texts],
            )
            for cut in cuts
        ]
        frame = Frame(texts, f"text, at positions {label[start]}", RISE, NATS, FLAT_MARGIN)
        words = f"Bars: rise of the loss at positions {label[start]} of {', '.join(texts)}."
        return bar_chart(bars, frame, words)

    texts = list(tables)
    panels = "".join(by_start(text, reach) for text in texts)
    views = [View((EVERY, EVERY), f'<div class="panels">{panels}</div>{key}')]
    views += [View((text, EVERY), by_start(text, ()) + key) for text in texts[len(texts) == 1 :]]
    views += [View((EVERY, label[s]), by_text(s, texts) + key) for s in starts]
    rows = [
        [text, r["cut"], r["first"], r["last"], r["rise"], *r["interval"], r["n_documents"]]
        for text, table in tables.items()
        for r in table
    ]
    head = ["text", "cut", "first position", "last position", "rise (nats per token)"]
    return PageFigure(
        "rise_by_position",
        alt.format(", ".join(texts)),
        f"Rise of the loss against the position in the text with {fraction:.0%} of the key "
        f"dimensions cut ({', '.join(texts)}); bars are 95% intervals over documents.",
        tuple(views),
        {
            "text": list(dict.fromkeys(view.choice[0] for view in views)),
            "positions": list(dict.fromkeys(view.choice[1] for view in views)),
        },
        csv_of([*head, "low", "high", "documents"], rows),
        "gl.analysis.rise_by_position(model, validation, cuts).plot()",
    )


def _value(rows: list[dict[str, Any]], cut: str, start: int) -> tuple[float, tuple[float, float]]:
    for row in rows:
        if row["cut"] == cut and row["first"] == start:
            low, high = row["interval"]
            return float(row["rise"]), (float(low), float(high))
    return float("nan"), (float("nan"), float("nan"))


def distance_figure(change: DistanceChange) -> PageFigure:
    """Change of attention by layer and distance, for each cut; heads of a layer on request."""
    columns = [f"{a:,}" if a == b else f"{a:,}–{b:,}" for a, b in change.buckets]
    scale = ColourScale.from_zero(change.change.ravel().tolist(), "change of attention")
    views = [
        HeatView((cut,), scale, change.change[c].mean(1), change.change[c])
        for c, cut in enumerate(change.cuts)
    ]
    axes = HeatAxes(
        [str(layer) for layer in range(change.change.shape[1])],
        columns,
        column="distance from query to key (tokens)",
        part="query head",
        notes=[f"{float(a):.1%} of attention" for a in change.attention.mean((0, 1))],
    )
    return heat_figure(
        "change_by_distance",
        views,
        axes,
        alt="Heat map, layers down: absolute change of attention by the distance between query "
        f"and key, for {change.cuts[0]}.",
        caption="Absolute change of attention by layer and distance, mean over query heads.",
        python="gl.analysis.change_by_distance(model, validation, cuts).plot()",
        choices=("cut",),
    )


def distance_lines(change: DistanceChange) -> PageFigure:
    """Change of attention by distance, mean over layers, and the pairs cut at each wavelength."""
    rows = change.table()
    alt = "Lines: absolute change of attention against the distance between query and key."
    lines, bars = distance_charts(change, alt)
    kept = ["cut", "first", "last", "attention", "after", "change", "pairs", "cut_pairs"]
    return PageFigure(
        "change_by_distance_mean",
        alt,
        "Absolute change of attention by distance, mean over layers and heads, and how many of "
        "the rotary pairs with that wavelength are cut.",
        (
            View(("change of attention",), lines),
            View(("pairs cut",), bars),
        ),
        {"show": ["change of attention", "pairs cut"]},
        csv_of(kept, [[r[k] for k in kept] for r in rows]),
        "gl.analysis.change_by_distance(model, validation, cuts).plot()",
    )


def damage_figures(damage: Damage) -> tuple[PageFigure, PageFigure]:
    """The cut in one layer alone, and in one key head alone."""
    layers = [str(i) for i in range(len(damage.by_layer))]
    values = [float(v) for v in damage.by_layer[:, 0]]
    worst = int(damage.by_layer[:, 0].argmax())
    alt = (
        "Bars: rise of the loss by layer when only that layer is cut; largest in layer "
        f"{worst} ({damage.by_layer.max():+.4f} nats)."
    )
    frame = Frame(layers, "layer", RISE, NATS)
    load = 'json.load(open("report.json"))["damage"]'
    start = "import json, numpy as np\nfrom gainlens.plots.curves import "
    by_layer = PageFigure(
        "damage_by_layer",
        alt,
        f"Rise of the loss when only one layer is cut by {DAMAGE_FRACTION:.0%}.",
        (View((), bar_chart([Series("one layer cut", values)], frame, alt)),),
        {},
        csv_of(["layer", "rise (nats per token)"], zip(layers, values, strict=True)),
        f'{start}plot_damage_by_layer\nplot_damage_by_layer(np.array({load}["by_layer"])[:, None])',
    )
    heads = [str(i) for i in range(damage.by_head.shape[1])]
    scale = ColourScale.around_zero(damage.by_head.ravel().tolist(), NATS)
    by_head = heat_figure(
        "damage_by_head",
        [HeatView((), scale, np.asarray(damage.by_head, dtype=float))],
        HeatAxes(layers, heads, column="key head"),
        alt="Heat map: rise of the loss by layer and key head when only that head is cut; "
        "the table below lists the largest.",
        caption=f"Rise of the loss when only one key head is cut by {DAMAGE_FRACTION:.0%}.",
        python=f'{start}plot_damage\nplot_damage(np.array({load}["by_head"]))',
    )
    return by_layer, by_head
