"""The sections of the page, made only from the result objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.report.claims import FLAT_MARGIN, FUNCTIONAL_MARGIN
from gainlens.report.figures import DAMAGE_FRACTION, Damage
from gainlens.report.page import PageFigure, PageTable, Section
from gainlens.report.reach import Reach
from gainlens.report.sections_map import (
    map_section,
    red_line_section,
    sharing_cost_section,
    sinks_section,
)
from gainlens.report.sections_reach import reach_sections


def all_sections(
    curve: SurgeryCurve,
    cmap: CoordinateMap,
    similarity: Sequence[dict[str, Any]],
    figures: dict[str, PageFigure],
    score: str,
    without: str = "",
    damage: Damage | None = None,
    reach: Reach | None = None,
) -> list[Section]:
    """All sections below the claims, in order."""
    sections = [surgery_section(curve, figures["surgery_impact"], score, without)]
    if reach is not None:
        sections += reach_sections(reach, figures)
    if damage is not None:
        sections.append(damage_section(damage, curve, figures, score))
    sections.append(map_section(cmap, similarity, figures))
    if cmap.sinks is not None:
        sections.append(sinks_section(cmap, figures.get("sinks")))
    if cmap.sharing_cost is not None:
        sections.append(sharing_cost_section(cmap, figures["sharing_cost"]))
    if cmap.red_line is not None:
        sections.append(red_line_section(cmap, figures["red_line"]))
    sections.append(
        Section(
            "gains",
            "Gains",
            ["The gain of each key dimension, by layer."],
            [figures["key_gains"]],
        )
    )
    return sections


def surgery_section(curve: SurgeryCurve, figure: PageFigure, score: str, without: str) -> Section:
    """The cost of cutting, with controls, and the best cut without training."""
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
            f"Whole rotary pairs are zeroed after the rotation, the same share in each key head, "
            f"ranked by {score} on the calibration text. The intact model has a loss of "
            f"{curve.baseline.mean():.4f} nats per token.",
            f"Flat means less than {FLAT_MARGIN:g} nats, highly functional less than "
            f"{FUNCTIONAL_MARGIN:g} nats (perplexity up by about a tenth).",
            "A better cut without training ranks pairs by fisher within each layer and refits the "
            "kept query and key dimensions by least squares to the intact attention logits on "
            "the calibration text (the maps fold into W_Q and W_K). "
            + (without or "The table lists it as refitted, next to the same cut only zeroed."),
        ],
        [figure],
        [
            PageTable(
                "Every cut", ["order", "cut", "loss (nats)", "rise (nats)", "95% interval"], rows
            )
        ],
    )


def damage_section(
    damage: Damage, curve: SurgeryCurve, figures: dict[str, PageFigure], score: str
) -> Section:
    """The damage of the cut, one place at a time."""
    together = curve.find(order="quietest", score=score, fraction=DAMAGE_FRACTION)
    whole = ""
    if together:
        whole = (
            f" Cut one at a time, the layers sum to {damage.by_layer.sum():+.3f} nats; together, "
            f"they cost {curve.deltas(together[0]).mean():+.3f} on the whole validation text."
        )
    order = np.argsort(-damage.by_head, axis=None, kind="stable")[:10]
    places = [np.unravel_index(i, damage.by_head.shape) for i in order]
    return Section(
        "damage",
        "Damage: where the cut hurts",
        [
            f"The quietest {DAMAGE_FRACTION:.0%} by {score}, cut in one layer (or one key head) "
            f"while all others stay intact, on {damage.n_documents} validation documents of "
            f"{damage.length} tokens: a guide to where to look, without intervals." + whole,
        ],
        [
            figures["damage_by_layer"],
            figures["damage_by_head"],
        ],
        [
            PageTable(
                "The key heads where the cut hurts most",
                ["layer", "key head", "rise (nats)"],
                [[str(a), str(b), f"{damage.by_head[a, b]:+.4f}"] for a, b in places],
            )
        ],
    )
