"""The page section on controls of the key claim and on effective ranks."""

from __future__ import annotations

from gainlens.analysis.effective_rank import EffectiveRank
from gainlens.analysis.side_controls import SideControls
from gainlens.report.page import PageTable, Section

UNITS = {
    "given": "those of the cut",
    "quietest queries": "quietest in queries alone",
    "complement": "all others (the cut's complement)",
    "random": "drawn at random",
}


def controls_section(
    controls: SideControls | None = None, ranks: EffectiveRank | None = None
) -> Section:
    """Is the claim about keys, is the kept set needed, and how many directions do heads use?

    Args:
        controls: controls of the cut on the page.
        ranks: effective ranks of queries and keys.
    """
    paragraphs, tables = [], []
    if controls is not None:
        paragraphs.append(
            "The cut and its controls, all by zeroing. Zeroing the same units in queries is the "
            "same cut, because it removes the same products from the logits. The complement keeps "
            "what was cut and cuts what was kept. Values live in another space, where the indices "
            "of the cut have no meaning and should cost as much as random ones."
        )
        paragraphs += [f"Skipped: {why}." for why in controls.without.values()]
        tables.append(
            PageTable(
                "The cut and its controls",
                ["cut in", "units", "cut", "rise (nats)", "95% interval"],
                [
                    [
                        {"key": "keys", "query": "queries", "value": "values"}[row["side"]],
                        UNITS[row["units"]]
                        + ("" if row["seed"] is None else f", seed {row['seed']}"),
                        f"{row['fraction']:.0%}",
                        f"{row['rise']:+.4f}",
                        f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
                    ]
                    for row in controls.table()
                ],
                words=(1,),
            )
        )
    if ranks is not None:
        paragraphs.append(
            f"Effective rank of a head of {ranks.d_head} dimensions: how many directions carry its "
            "variance over tokens. The rotation spreads a pair's variance over positions."
        )
        tables.append(
            PageTable(
                "Effective rank, mean over heads",
                ["of", "stage", "entropy rank", "lowest to highest head", "participation ratio"],
                [
                    [
                        {"key": "keys", "query": "queries"}[row["side"]],
                        row["stage"],
                        f"{row['entropy']:.1f}",
                        f"{row['entropy_lowest']:.1f} to {row['entropy_highest']:.1f}",
                        f"{row['participation']:.1f}",
                    ]
                    for row in ranks.summary()
                ],
                words=(1,),
            )
        )
    return Section("controls", "Controls of the key claim", paragraphs, [], tables)
