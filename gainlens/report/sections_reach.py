"""The page sections on where a cut hurts: by position and distance, across texts, on tasks."""

from __future__ import annotations

from gainlens.analysis.task_scores import INTACT
from gainlens.report.page import PageFigure, PageTable, Section
from gainlens.report.reach import FRACTION, Reach
from gainlens.report.sections_controls import controls_section
from gainlens.report.sections_price import price_section


def reach_sections(reach: Reach, figures: dict[str, PageFigure]) -> list[Section]:
    """All sections, in order."""
    found = []
    if reach.by_position:
        found.append(position_section(reach, figures))
    if reach.across:
        found.append(across_section(reach))
    if reach.tasks is not None:
        found.append(tasks_section(reach))
    if reach.price is not None and reach.price.rows:
        found.append(price_section(reach.price, figures))
    if reach.controls is not None or reach.ranks is not None:
        found.append(controls_section(reach.controls, reach.ranks))
    if reach.skipped and found:
        found[-1].paragraphs.append("Not measured: " + "; ".join(reach.skipped) + ".")
    return found


def position_section(reach: Reach, figures: dict[str, PageFigure]) -> Section:
    """Rise by position, and change of attention by distance."""
    rows = [
        [
            name,
            row["cut"],
            f"{row['first']:,} to {row['last']:,}",
            f"{row['rise']:+.4f}",
            f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
            str(row["n_documents"]),
        ]
        for name, rise in reach.by_position.items()
        for row in rise.table()
    ]
    tables = [
        PageTable(
            "Rise of the loss by position",
            ["text", "cut", "positions", "rise (nats)", "95% interval", "documents"],
            rows,
            words=(1,),
        )
    ]
    longest = max(max(rise.lengths) for rise in reach.by_position.values())
    paragraphs = [
        f"A mean over short texts hides what a cut costs far into a text. Documents of up to "
        f"{longest:,} tokens; each cut takes {FRACTION:.0%} of the key dimensions.",
    ]
    shown = []
    change = reach.by_distance
    if change is not None:
        paragraphs.append(
            "Which distances are hit: in every layer the cut acts on the queries and keys of the "
            "intact model, and the change of attention is added over the keys at each distance."
        )
        shown += [figures["change_by_distance_mean"], figures["change_by_distance"]]
    return Section("position", "Position and distance", paragraphs, shown, tables)


def across_section(reach: Reach) -> Section:
    """Chosen on one text, judged on another."""
    chosen = list(dict.fromkeys(row["chosen_on"] for row in reach.across))
    judged = list(dict.fromkeys(row["judged_on"] for row in reach.across))
    at = {(row["chosen_on"], row["judged_on"]): row for row in reach.across}

    def cell(row: object) -> str:
        assert isinstance(row, dict)
        low, high = row["interval"]
        return f"{row['rise']:+.3f} [{low:+.3f}, {high:+.3f}]"

    n = reach.across[0]["n_documents"]
    return Section(
        "texts",
        "Texts: chosen on one, judged on another",
        [
            f"The best cut of {FRACTION:.0%} without training, ranked and fitted on one text alone "
            f"and judged on {n} validation documents of each: rise of the loss in nats per token, "
            "with 95% intervals."
        ],
        [],
        [
            PageTable(
                "Rise of the loss (nats), rows: chosen on, columns: judged on",
                ["chosen on", *judged],
                [[one, *(cell(at[one, other]) for other in judged)] for one in chosen],
            )
        ],
    )


def tasks_section(reach: Reach) -> Section:
    """Tasks that a mean loss hardly shows."""
    assert reach.tasks is not None
    rows, nothing = [], []
    for row in reach.tasks.rows:
        if not row.shows:
            if row.label == INTACT:
                nothing.append(f"{row.task} ({row.choice:.0%} right, chance {row.chance:.0%})")
            continue
        low, high = row.interval
        rows.append(
            [
                row.task,
                row.label,
                f"{row.exact_match:.0%}",
                f"{row.choice:.0%}",
                "" if row.label == INTACT else f"{row.difference:+.3f}",
                "" if row.label == INTACT else f"{low:+.3f} to {high:+.3f}",
            ]
        )
    length = max(row.length for row in reach.tasks.rows)
    paragraphs = [
        f"Prompts of {length:,} tokens with a known answer, {reach.tasks.facts['n']} per task, the "
        "same for the intact and the cut model. The difference is that of the answer's "
        "log-probability, nats per token; below 0 the cut makes the right answer less likely."
    ]
    if nothing:
        paragraphs.append(
            "These show nothing, since the intact model is at chance: " + ", ".join(nothing) + "."
        )
    head = ["task", "model", "exact", "chosen", "difference (nats)", "95% interval"]
    tables = [PageTable("Tasks", head, rows, words=(1,))] if rows else []
    groups = [
        [
            {"contextual": "stands in the prompt", "parametric": "is in the weights"}[row.group],
            row.label,
            ", ".join(row.tasks),
            f"{row.difference:+.3f}",
            f"{row.interval[0]:+.3f} to {row.interval[1]:+.3f}",
        ]
        for row in reach.tasks.groups
        if row.label != INTACT
    ]
    if groups:
        head = ["the answer", "model", "tasks", "difference (nats)", "95% interval"]
        tables.append(PageTable("Contextual and parametric knowledge", head, groups, words=(1, 2)))
    return Section("tasks", "Tasks: what a mean loss hides", paragraphs, [], tables)
