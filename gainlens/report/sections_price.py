"""The page section on one coordinate system: of dimensions, of directions, or of frequencies."""

from __future__ import annotations

from gainlens.analysis.map.universality import UniversalityPrice
from gainlens.report.figures_of_price import SHARED_BY
from gainlens.report.page import PageFigure, PageTable, Section


def price_section(price: UniversalityPrice, figures: dict[str, PageFigure]) -> Section:
    """What sharing costs, zeroed, refitted and with slots; where the slots lie."""
    texts = list(dict.fromkeys(name for row in price.rows for name in row["by_text"]))
    rows = [
        [
            SHARED_BY[row["scope"]],
            row["kind"],
            f"{row['rise']:+.4f}",
            f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
            *(f"{row['by_text'][name]:+.4f}" for name in texts),
        ]
        for row in price.rows
    ]
    shown = [figures[name] for name in ("price", "slots") if name in figures]
    paragraphs = [
        f"{price.fraction:.0%} of the key dimensions of every head go. Zeroed and refitted, heads "
        "that share a set share dimensions. With slots they share frequencies: a pair moves into "
        "a slot of nearly its frequency. Nothing is trained. Judged on "
        f"{price.rises.shape[1]} validation documents.",
        *answer(price),
    ]
    if price.skipped:
        paragraphs.append("Not measured: " + "; ".join(price.skipped) + ".")
    head = ["shared by", "kind", "rise (nats)", "95% interval", *texts]
    table = PageTable("The price of sharing", head, rows, words=(1,))
    return Section("price", "One coordinate system: at which price", paragraphs, shown, [table])


def answer(price: UniversalityPrice) -> list[str]:
    """The claim's answer in one sentence, where all of it was measured."""
    at = {(row["scope"], row["kind"]): row["rise"] for row in price.rows}
    wanted = [("universal", kind) for kind in ("zeroed", "refitted", "slots")]
    if any(key not in at for key in (*wanted, ("head", "refitted"))):
        return []
    zeroed, refitted, slots = (at[key] for key in wanted)
    return [
        f"One set of dimensions for all heads costs {zeroed:+.3f} nats zeroed and {refitted:+.3f} "
        f"refitted; one set of frequencies costs {slots:+.3f}. A set of its own for each head, "
        f"refitted, costs {at['head', 'refitted']:+.3f}."
    ]
