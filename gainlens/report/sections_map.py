"""The page sections from a coordinate map: similarity, sinks, sharing cost, red line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.report.page import PageFigure, PageTable, Section
from gainlens.stats.verdicts import Verdict


def map_section(
    cmap: CoordinateMap, similarity: Sequence[dict[str, Any]], figures: dict[str, PageFigure]
) -> Section:
    """Is there one coordinate system, and what is the evidence?"""
    shared, by_head = cmap.verdict(), cmap.verdict(claim="shared by heads")
    kind = cmap.units.kind
    paragraphs = [
        f"Layers, averaged over their heads: {cmap.answer}. {_correlation(shared)}",
        f"Single heads of different layers: {cmap.answer_by_head}. {_correlation(by_head)}",
        "The comparison uses log gains minus each layer's own smooth profile over "
        "log frequency: two layers whose slow pairs are loud follow the same curve without "
        "sharing anything.",
        _named(cmap, cmap.universal_units, f"{kind}s are loud in most layers"),
        _named(cmap, cmap.universal_units_by_head, f"{kind}s are loud in most single heads"),
        _named(cmap, cmap.universal.beyond_chance, f"{kind}s are loud more widely than by chance"),
        "Non-negative vectors always have a high cosine, so read each cosine with its null "
        "and its centred value. Alignment: " + str(cmap.facts["alignment"]) + ".",
    ]
    rows = [
        [
            row["score"],
            row["stage"],
            row["unit"],
            f"{row['cosine']:.3f}",
            f"{row['null_cosine']:.3f}",
            f"{row['null_cosine_frequency']:.3f}" if "null_cosine_frequency" in row else "–",
            f"{row['cv']:.2f}",
            f"{row['centred_cosine']:.3f}",
            f"{row['residual_correlation']:.3f}",
            row["answer"],
        ]
        for row in similarity
    ]
    head = ["gain", "stage", "unit", "cosine", "null", "profile null", "CV", "centred"]
    return Section(
        "map",
        "Map: do layers use the same dimensions?",
        paragraphs,
        [
            figures["layer_correlation"],
            figures["universal_units"],
            figures["unit_presence"],
        ],
        [
            PageTable(
                "Similarity of layers by gain",
                [*head, "beyond frequency", "answer"],
                rows,
                words=(1, 2, 9),
            )
        ],
    )


def _correlation(verdict: Verdict) -> str:
    """A verdict on sharing as a sentence."""
    low, high = verdict.interval
    return (
        f"{verdict.claim.capitalize()}: {verdict.status}, correlation {verdict.estimate:.3f} "
        f"[{low:.3f}, {high:.3f}]."
    )


def _named(cmap: CoordinateMap, units: Sequence[int], what: str) -> str:
    """How many units, and which, with their wavelengths."""
    wave = cmap.units.wavelength
    names = ", ".join(
        str(u) if wave[u] is None else f"{u} ({tokens_per_turn(wave[u])} tokens)"
        for u in map(int, units)
    )
    return f"{len(units)} of {len(cmap.units)} {what}" + (f": {names}." if names else ".")


def sinks_section(cmap: CoordinateMap, figure: PageFigure | None) -> Section:
    """Which units carry the attention sink, layer by layer."""
    sinks = cmap.sinks
    assert sinks is not None
    if figure is None:
        return Section(
            "sinks",
            "Sinks: which units draw attention to the first position",
            [
                f"None of the {len(sinks.mass)} layers has a key head whose queries give the first "
                f"position at least {sinks.min_mass:.0%} of their attention (an even spread gives "
                f"{sinks.uniform:.1%})."
            ],
        )
    rows = [
        [
            str(row["unit"]),
            tokens_per_turn(row["wavelength"]),
            f"{row['share_of_sink_layers']:.0%}",
            spans(row["layers"]),
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
            f"gives {sinks.uniform:.1%}). The table lists the units that carry most of it, the "
            "most persistent first.",
        ],
        [figure],
        [
            PageTable(
                "Units that carry the sink, the most persistent first",
                [
                    cmap.units.kind,
                    "wavelength (tokens)",
                    "of sink layers",
                    "layers",
                    "largest (nats)",
                ],
                rows,
                words=(3,),
            )
        ],
    )


def sharing_cost_section(cmap: CoordinateMap, figure: PageFigure) -> Section:
    """The cost of sharing one index set."""
    cost = cmap.sharing_cost
    assert cost is not None
    rows = [
        [
            row["scope"],
            str(row["score"]),
            f"{row['fraction']:.0%}",
            f"{row['rise']:+.4f}",
            f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
        ]
        for row in cost.rows
    ]
    verdict = cost.verdict()
    return Section(
        "sharing-cost",
        "The cost of sharing one index set",
        [
            "At equal cuts: one index set for all layers and heads, one per layer, one per head. "
            f"{verdict.status.capitalize()}: {verdict.claim} "
            f"({verdict.estimate:+.3f} [{verdict.interval[0]:+.3f}, {verdict.interval[1]:+.3f}] "
            "nats)."
        ],
        [figure],
        [
            PageTable(
                "One index set per head, per layer, and for all",
                ["scope", "ranked by", "cut", "rise (nats)", "95% interval"],
                rows,
                words=(1,),
            )
        ],
    )


def red_line_section(cmap: CoordinateMap, figure: PageFigure) -> Section:
    """The smallest set that keeps the loss within a margin."""
    line = cmap.red_line
    assert line is not None
    n_heads = int(cmap.facts.get("n_heads", 0)) * len(cmap.cv)
    head, rows = red_line_table(line.details, n_heads, cmap.units.kind)
    judged = "; ".join(_judged(name, line.verdict(name)) for name in line.judged)
    return Section(
        "red-line",
        "The red line: what must be kept",
        [
            f"To keep the loss within {line.margin:g} nats, {len(line.universal)} of "
            f"{line.n_units} {cmap.units.kind}s must stay if all layers share one set, "
            f"{len(line.per_layer[0])} if each layer has its own. The size was chosen on "
            f"calibration text and judged on validation text: {judged}.",
            "A head uses a unit if it is in the loudest quarter. Patched alone means that the "
            "unit is set to its calibration mean in every layer and head and all else is intact. "
            "The gain at a position is relative to the unit's own mean over positions.",
        ],
        [figure],
        [PageTable("Units of the universal set, loudest first", head, rows, words=(2, 6))],
    )


def red_line_table(
    details: Sequence[dict[str, Any]], n_heads: int, kind: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the universal set, with all measurements of each unit."""
    head = [
        f"{kind} (dims)",
        "wavelength (tokens)",
        "layers that use it",
        f"heads (of {n_heads})",
        "patched alone: rise (nats)",
        "gain at the first → last positions",
        "loudest tokens",
    ]
    rows = []
    for row in details:
        wave, rise, position = row["wavelength"], row.get("patched_rise"), "–"
        patched = "–"
        if rise is not None:
            low, high = row["patched_interval"]
            patched = f"{rise:+.4f} [{low:+.4f}, {high:+.4f}]"
        if "gain_by_position" in row:
            by = row["gain_by_position"]
            position = (
                f"{by['relative_rms'][0]:.2f} → {by['relative_rms'][-1]:.2f} "
                f"(from {by['from_position'][-1]})"
            )
        tokens = dict.fromkeys(t["text"].strip() or repr(t["text"]) for t in row.get("tokens", ()))
        rows.append(
            [
                f"{row['unit']} ({', '.join(map(str, row['dims']))})",
                tokens_per_turn(wave),
                spans(row["used_by_layers"]) or "none",
                str(len(row["used_by_heads"])),
                patched,
                position,
                ", ".join(f"“{text}”" for text in list(tokens)[:4]) or "–",
            ]
        )
    return head, rows


def _judged(scope: str, verdict: Verdict) -> str:
    low, high = verdict.interval
    return (
        f"{scope}, {verdict.status} ({verdict.estimate:+.3f} [{low:+.3f}, {high:+.3f}] nats, "
        f"{verdict.n_documents} documents)"
    )


def tokens_per_turn(wavelength: float | None) -> str:
    """Three digits without exponent; a dash if the unit does not rotate."""
    if wavelength is None:
        return "–"
    return f"{wavelength:.3g}" if wavelength < 1000 else f"{float(f'{wavelength:.3g}'):,.0f}"


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers with runs shortened: 0–2, 5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
