"""The sections of the page, each from the result objects alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gainlens.analysis.coordinates import CoordinateMap
from gainlens.analysis.curve import SurgeryCurve
from gainlens.probes.gains import KeyGains
from gainlens.report import plots_map
from gainlens.report.claims import FLAT_MARGIN, FUNCTIONAL_MARGIN
from gainlens.report.page import PageFigure, PageTable, Section
from gainlens.report.plots import plot_gains
from gainlens.report.plots_surgery import plot_surgery


def draw_figures(
    folder: Path, gains: KeyGains, curve: SurgeryCurve, cmap: CoordinateMap, score: str
) -> dict[str, Path]:
    """Write every figure as a PNG file; returns their paths by name."""

    def figure(width: float, height: float, *drawings: Callable[[Any], Any]) -> Any:
        from matplotlib.figure import Figure

        made = Figure(figsize=(width, height), layout="constrained")
        axes = made.subplots(1, len(drawings), squeeze=False)[0]
        for draw, ax in zip(drawings, axes, strict=True):
            draw(ax)
        return made

    made = {
        "key_gains": figure(9, 4.2, lambda ax: plot_gains(gains, ax, score)),
        "surgery_impact": figure(8, 4.6, lambda ax: plot_surgery(curve, ax, FLAT_MARGIN)),
        "layer_correlation": figure(
            11,
            4.8,
            lambda ax: plots_map.plot_cosine(cmap, ax),
            lambda ax: plots_map.plot_above_null(cmap, ax),
        ),
        "universal_units": figure(
            13,
            5,
            lambda ax: plots_map.plot_units(cmap, ax),
            lambda ax: plots_map.plot_ranks(cmap, ax),
        ),
    }
    if cmap.sinks is not None:
        made["sinks"] = figure(8, 5, lambda ax: plots_map.plot_sinks(cmap, ax))
    if cmap.price is not None:
        made["price"] = figure(7, 4, lambda ax: plots_map.plot_price(cmap, ax))
    if cmap.red_line is not None:
        made["red_line"] = figure(10, 5, lambda ax: plots_map.plot_red_line(cmap, ax))
    paths = {}
    for name, drawn in made.items():
        paths[name] = folder / f"{name}.png"
        drawn.savefig(paths[name], dpi=120)
    return paths


def all_sections(
    curve: SurgeryCurve,
    cmap: CoordinateMap,
    similarity: Sequence[dict[str, Any]],
    figures: dict[str, Path],
    score: str,
    without: str = "",
) -> list[Section]:
    """The page below the claims, in order."""
    sections = [
        surgery_section(curve, figures["surgery_impact"], score, without),
        map_section(cmap, similarity, figures),
    ]
    if cmap.sinks is not None:
        sections.append(sinks_section(cmap, figures["sinks"]))
    if cmap.price is not None:
        sections.append(price_section(cmap, figures["price"]))
    if cmap.red_line is not None:
        sections.append(red_line_section(cmap, figures["red_line"]))
    sections.append(
        Section(
            "gains",
            "Gains",
            ["How loud each key dimension is, by layer."],
            [
                PageFigure.of(
                    figures["key_gains"],
                    "Heat map of the gain of each key dimension by layer, on a logarithmic scale.",
                    f"Gain ({score}) of each key dimension, mean over key heads, each head scaled "
                    "to mean 1.",
                )
            ],
        )
    )
    return sections


def surgery_section(curve: SurgeryCurve, figure: Path, score: str, without: str) -> Section:
    """What cutting costs, with controls, and the best that needs no training."""
    rows = []
    for row in curve.table():
        low, high = row["interval"]
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        rows.append(
            [
                row["label"] or row["order"] + seed,
                f"{row['fraction']:.0%}",
                f"{row['loss']:.4f}",
                f"{row['delta']:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
            ]
        )
    return Section(
        "surgery",
        "Surgery: what cutting costs",
        [
            f"Whole rotary pairs are zeroed after the rotation, in each key head the same share, "
            f"ranked by {score} on the calibration text. The intact model has a loss of "
            f"{curve.baseline.mean():.4f} nats per token.",
            f"Flat means less than {FLAT_MARGIN:g} nats, highly functional less than "
            f"{FUNCTIONAL_MARGIN:g} nats (perplexity up by about a tenth).",
            "A cut that needs no training either: pairs ranked by fisher within a layer, and the "
            "kept query and key dimensions refitted by least squares to the intact attention "
            "logits of the calibration text (the maps fold into W_Q and W_K). "
            + (without or "It is in the table as refitted, beside the same cut merely zeroed."),
        ],
        [
            PageFigure.of(
                figure,
                "Rise of the loss against the share of key dimensions cut, for the quietest pairs, "
                "random pairs and the loudest pairs; the table below has the numbers.",
                "Rise of the loss against the share of key dimensions cut.",
            )
        ],
        [PageTable(["order", "cut", "loss (nats)", "rise (nats)", "95% interval"], rows)],
    )


def map_section(
    cmap: CoordinateMap, similarity: Sequence[dict[str, Any]], figures: dict[str, Path]
) -> Section:
    """Is there one coordinate system, and on what evidence."""
    shared = cmap.verdict(claim="shared")
    kind = cmap.units.kind
    paragraphs = [
        f"Answer: {shared.note}.",
        _named(cmap, cmap.universal_units, f"{kind}s are loud in most layers and heads"),
        _named(cmap, cmap.universal.beyond_chance, f"{kind}s are loud more widely than by chance"),
        "Non-negative vectors are never far from parallel, so a cosine is read beside its null "
        "and its centred value. Alignment: " + str(cmap.facts["alignment"]) + ".",
    ]
    rows = [
        [
            row["score"],
            row["stage"],
            row["unit"],
            f"{row['cosine']:.3f}",
            f"{row['null_cosine']:.3f}",
            f"{row['null_cosine_band']:.3f}" if "null_cosine_band" in row else "–",
            f"{row['cv']:.2f}",
            f"{row['centred_cosine']:.3f}",
            f"{row['spearman']:.3f}",
            row["answer"],
        ]
        for row in similarity
    ]
    head = ["gain", "stage", "unit", "cosine", "null", "band null", "CV", "centred", "Spearman"]
    return Section(
        "map",
        "Map: do layers use the same dimensions?",
        paragraphs,
        [
            PageFigure.of(
                figures["layer_correlation"],
                "Two heat maps, layer by layer: the cosine of gains, and what is left of it above "
                "the mean of its permutation null.",
                "Cosine between layers, and what is left above its null.",
            ),
            PageFigure.of(
                figures["universal_units"],
                f"Gain of each {kind} by layer, and {kind}s ranked by how much more often than "
                "chance they are among the loudest.",
                f"Gain of every {kind} by layer, and how present each is among the loudest.",
            ),
        ],
        [PageTable([*head, "answer"], rows)],
    )


def _named(cmap: CoordinateMap, units: Sequence[int], what: str) -> str:
    """How many units, and which, with their wavelengths."""
    wave = cmap.units.wavelength
    names = ", ".join(
        str(u) if wave[u] is None else f"{u} ({wave[u]:.3g} tokens)" for u in map(int, units)
    )
    return f"{len(units)} of {len(cmap.units)} {what}" + (f": {names}." if names else ".")


def sinks_section(cmap: CoordinateMap, figure: Path) -> Section:
    """Which units carry the attention sink, layer by layer."""
    sinks = cmap.sinks
    assert sinks is not None
    rows = [
        [
            str(row["unit"]),
            "–" if row["wavelength"] is None else f"{row['wavelength']:.3g}",
            f"{row['share_of_sink_layers']:.0%}",
            ", ".join(str(layer) for layer in row["layers"]),
            f"{row['largest_advantage_nats']:.2f}",
        ]
        for row in sinks.through_depth()[:16]
    ]
    return Section(
        "sinks",
        "Sinks: which units draw attention to the first position",
        [
            f"{len(sinks.layers)} of {len(sinks.mass)} layers have a key head whose queries give "
            f"the first position at least {sinks.min_mass:.0%} of their attention (an even spread "
            f"gives {sinks.uniform:.1%}). Below, the units that carry most of it, the most "
            "lasting first.",
        ],
        [
            PageFigure.of(
                figure,
                "Heat map of the units that carry the sink in each layer, by the nats that they "
                "add to the first position's logit.",
                "Units that carry the attention sink, by layer.",
            )
        ],
        [
            PageTable(
                [
                    cmap.units.kind,
                    "wavelength (tokens)",
                    "of sink layers",
                    "layers",
                    "largest (nats)",
                ],
                rows,
            )
        ],
    )


def price_section(cmap: CoordinateMap, figure: Path) -> Section:
    """What sharing one index set costs."""
    price = cmap.price
    assert price is not None
    rows = [
        [
            row["sharing"],
            str(row["score"]),
            f"{row['cut']:.0%}",
            f"{row['rise']:+.4f}",
            f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
        ]
        for row in price.rows
    ]
    verdict = price.verdict()
    return Section(
        "price",
        "The price of universality",
        [
            "At equal cuts: one index set for the whole model, one per layer, one per head. "
            f"{verdict.status.capitalize()}: {verdict.claim} "
            f"({verdict.estimate:+.3f} [{verdict.interval[0]:+.3f}, {verdict.interval[1]:+.3f}] "
            "nats)."
        ],
        [
            PageFigure.of(
                figure,
                "Bars: rise of the loss for a set per head, per layer, one shared set and a random "
                "shared set, at each cut.",
                "Rise of the loss by design of sharing.",
            )
        ],
        [PageTable(["one set per", "ranked by", "cut", "rise (nats)", "95% interval"], rows)],
    )


def red_line_section(cmap: CoordinateMap, figure: Path) -> Section:
    """The smallest set that keeps the loss within a margin."""
    line = cmap.red_line
    assert line is not None
    rows = [
        [
            str(row["unit"]),
            "–" if row["wavelength"] is None else f"{row['wavelength']:.3g}",
            str(len({layer for layer, _ in row["used_by_heads"]})),
        ]
        for row in line.details
    ]
    judged = "; ".join(f"{name}: {line.verdict(name)!r}" for name in line.judged)
    return Section(
        "red-line",
        "The red line: what has to stay",
        [
            f"To keep the loss within {line.margin:g} nats, {len(line.shared)} of {line.n_units} "
            f"{cmap.units.kind}s must stay if all layers share one set, {len(line.per_layer[0])} "
            f"if each layer has its own. The size was chosen on calibration text; {judged}."
        ],
        [
            PageFigure.of(
                figure,
                "Heat map of the layers that use each unit of the shared set.",
                "The shared set, loudest first, and the layers that use each unit.",
            )
        ],
        [PageTable([cmap.units.kind, "wavelength (tokens)", "layers that use it"], rows)],
    )
