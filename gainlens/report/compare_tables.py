"""Tables that compare reports: one row per measurement, one column per report.

They read ``report.json`` alone. A part that a report lacks (skipped, or of another version) is a
dash, so that reports of different versions and settings still stand beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gainlens.report.page import PageTable

Facts = Mapping[str, Any]
Named = Sequence[tuple[str, Facts]]
"""Each report's label and its ``report.json``."""
NONE = "–"
CLAIM_HEAD = (
    "model",
    "verdict",
    "estimate",
    "interval",
    "bound",
    "documents",
    "judged on",
    "control",
    "text by text",
)


def claims_of(facts: Facts) -> dict[str, Facts]:
    """The claims of a report by their words, the best cut last."""
    found = [*facts["claims"], *([facts["best_cut"]] if facts.get("best_cut") else [])]
    return {claim["quote"]: claim for claim in found}


def claim_rows(reports: Named) -> list[dict[str, Any]]:
    """Every claim of every report, as plain values."""
    quotes = dict.fromkeys(quote for _, facts in reports for quote in claims_of(facts))
    return [
        {"report": label, **claims_of(facts)[quote]}
        for quote in quotes
        for label, facts in reports
        if quote in claims_of(facts)
    ]


def claims_table(quote: str, reports: Named) -> PageTable:
    """One claim: a row per report."""
    rows = []
    for label, facts in reports:
        claim = claims_of(facts).get(quote)
        if claim is None:
            rows.append([label, *[NONE] * (len(CLAIM_HEAD) - 1)])
            continue
        verdict = claim["verdict"]
        rows.append(
            [
                label,
                claim["status"],
                _number(verdict.get("estimate")),
                bounds(verdict.get("interval")),
                _plain(verdict.get("margin")),
                _plain(verdict.get("n_documents")),
                claim.get("where") or "the calibration text",
                claim.get("control") or NONE,
                _by_text(verdict.get("note") or ""),
            ]
        )
    width = len(CLAIM_HEAD) - all(row[-1] == NONE for row in rows)
    return PageTable(
        quote, list(CLAIM_HEAD[:width]), [row[:width] for row in rows], words=(1, 6, 7, 8)
    )


def all_tables(reports: Named) -> list[PageTable]:
    """All tables below the claims; one that no report has anything for is left out."""
    tables = [
        overview(reports),
        worth_table(reports),
        map_table(reports),
        cuts_table(reports),
        texts_table(reports),
        position_table(reports),
        tasks_table(reports),
    ]
    return [table for table in tables if table.rows]


def overview(reports: Named) -> PageTable:
    """What each model is, and how well it reads the text uncut."""

    def shape(facts: Facts) -> str:
        m = facts["model"]
        return (
            f"{m['n_layers']} layers, {m['n_heads']} query heads, {m['n_kv_heads']} key heads of "
            f"{m['d_head']}, {m['rotary_dim'] // 2} rotary pairs"
        )

    rows = {
        "architecture": lambda facts: facts["model"]["architecture"],
        "shape": shape,
        "text": lambda facts: (
            f"{facts['plan']['n_docs']} documents of {facts['plan']['text'].replace(',', ', ')} × "
            f"{facts['plan']['length']} tokens"
        ),
        "intact loss (nats per token)": lambda facts: f"{facts['intact_loss']:.3f}",
    }
    return _columns("Models and texts", "", reports, rows)


def _cache_bytes(facts: Facts) -> int:
    """Keys and values of a token in float16, values as wide as keys."""
    m = facts["model"]
    return 2 * 2 * int(m["n_layers"]) * int(m["n_kv_heads"]) * int(m["d_head"])


def worth_table(reports: Named) -> PageTable:
    """What half of the key dimensions are worth, and what they cost without training."""

    def cache(share_of_keys: float) -> Callable[[Facts], str]:
        def said(facts: Facts) -> str:
            share = (share_of_keys + 1) / 2
            found = f"{_cache_bytes(facts) * share:,.0f}"
            return found if share == 1 else f"{found} (× {share:g})"

        return said

    def cost(facts: Facts) -> str:
        verdict = (facts.get("best_cut") or {}).get("verdict")
        if not verdict:
            return NONE
        texts = len(verdict.get("domain") or ())
        return f"{verdict['estimate']:+.3f}" + (f", worst of {texts} texts" if texts > 1 else "")

    rows = {
        "cache, float16 (bytes per token)": cache(1),
        "with half of the key dimensions": cache(0.5),
        "with half of the values too": lambda facts: f"{_cache_bytes(facts) / 2:,.0f} (× 0.5)",
        "cost of half of the keys, refitted (nats per token)": cost,
    }
    return _columns("What it is worth", "", reports, rows)


def map_table(reports: Named) -> PageTable:
    """Do layers use the same dimensions?"""

    def summary(name: str, digits: int = 3) -> Callable[[Facts], str]:
        return lambda facts: f"{facts['map']['summary'][name]:.{digits}f}"

    def universal(facts: Facts) -> str:
        found, of = facts["map"]["universal_units"], facts["map"]["units"]["dims"]
        return f"{len(found)} of {len(of)}"

    def sinks(facts: Facts) -> str:
        found, layers = facts["map"]["sinks"], facts["model"]["n_layers"]
        chance = (
            "" if found["persistence"] is None else f", the same unit {found['persistence']:.2f}"
        )
        return f"{len(found['layers'])} of {layers} layers{chance}"

    def red_line(facts: Facts) -> str:
        line = facts["map"]["red_line"]
        own = len(line["per_layer"][0])
        return f"{len(line['universal'])} shared, {own} own, of {line['n_units']}"

    rows = {
        "answer": lambda facts: facts["map"]["answer"],
        "answer, single heads": lambda facts: facts["map"]["answer_by_head"],
        "correlation beyond frequency": lambda facts: _with(
            facts["map"]["effect"]["residual_correlation"], facts["map"]["effect"]["interval"]
        ),
        "correlation beyond frequency, heads": summary("residual_correlation_heads"),
        "mean cosine between layers": summary("cosine"),
        "cosine by chance, around the profile": summary("null_cosine_frequency"),
        "centred cosine": summary("centred_cosine"),
        "CV of the gains": summary("cv", 2),
        "universal pairs": universal,
        "layers with a sink head": sinks,
        "pairs that must stay (red line)": red_line,
    }
    return _columns("Map: do layers use the same dimensions?", "", reports, rows)


def cuts_table(reports: Named) -> PageTable:
    """Rise of the loss by what is cut, averaged over seeds."""

    def cells(facts: Facts) -> dict[str, str]:
        points: dict[str, list[Facts]] = {}
        for row in facts.get("surgery") or ():
            if row["order"] == "intact":
                continue
            ranked = f"{row['order']} by {row['score']}" if row["score"] else row["order"]
            name = row["label"] or (row["order"] if row["order"] == "random" else ranked)
            points.setdefault(f"{row['fraction']:.0%} cut, {name}", []).append(row)
        made = {}
        for name, rows in points.items():
            rise = sum(row["delta"] for row in rows) / len(rows)
            # Seeds share their documents, so intervals of several are not to be averaged.
            made[name] = _with(rise, rows[0]["interval"]) if len(rows) == 1 else (
                f"{rise:+.3f} ({len(rows)} seeds)"
            )  # fmt: skip
        return made

    return _matched(
        "Every cut: rise of the loss (nats per token) with its 95% interval", "cut", reports, cells
    )


def texts_table(reports: Named) -> PageTable:
    """The best cut at half, by the text that chose it and the text that judged it."""

    def cells(facts: Facts) -> dict[str, str]:
        return {
            f"{row['chosen_on']} → {row['judged_on']}": _with(row["rise"], row["interval"])
            for row in (facts.get("reach") or {}).get("across_texts") or ()
        }

    return _matched(
        "By text: half cut and refitted, chosen on one text and judged on another (nats)",
        "chosen on → judged on",
        reports,
        cells,
    )


def position_table(reports: Named) -> PageTable:
    """Rise of the loss by text, cut and position; the last position can differ by context."""

    def cells(facts: Facts) -> dict[str, str]:
        found = (facts.get("reach") or {}).get("by_position") or {}
        return {
            f"{text}, {row['cut']}, from {row['first']:,}": (
                f"{_with(row['rise'], row['interval'])} to {row['last']:,}"
            )
            for text, rise in found.items()
            for row in rise["rows"]
        }

    return _matched(
        "By position: half cut, rise of the loss (nats) up to the position named",
        "text, cut, first position",
        reports,
        cells,
    )


def tasks_table(reports: Named) -> PageTable:
    """Change of the log-probability of the right answer by kind of task."""

    def cells(facts: Facts) -> dict[str, str]:
        found = (facts.get("reach") or {}).get("tasks") or {}
        return {
            f"{row['group']}, {row['length']:,} tokens, {row['label']}": _with(
                row["difference"], row["interval"]
            )
            for row in found.get("groups") or ()
            if row["label"] != "intact"
        }

    return _matched(
        "Tasks: change of the answer's log-probability (nats per token)", "task", reports, cells
    )


def _by_text(note: str) -> str:
    """The verdict on each text, where there were several."""
    return note.split("; ", 1)[1] if note.startswith("decided by") and "; " in note else NONE


def bounds(pair: Sequence[float | None] | None) -> str:
    """``low to high``, signed; a dash where there is none."""
    if not pair or any(end is None for end in pair):
        return NONE
    return f"{pair[0]:+.3f} to {pair[1]:+.3f}"


def _columns(
    caption: str, first: str, reports: Named, rows: Mapping[str, Callable[[Facts], str]]
) -> PageTable:
    """A row per function; a dash where a report lacks what the function reads."""
    made = []
    for name, read in rows.items():
        cells = []
        for _, facts in reports:
            try:
                cells.append(read(facts))
            except (KeyError, TypeError, IndexError, ValueError):
                cells.append(NONE)
        made.append([name, *cells])
    head = [first, *(label for label, _ in reports)]
    return PageTable(caption, head, made, words=tuple(range(1, len(head))))


def _matched(
    caption: str, first: str, reports: Named, cells: Callable[[Facts], dict[str, str]]
) -> PageTable:
    """A row per name that any report has, in the order of the first report that has it."""
    columns = []
    for _, facts in reports:
        try:
            columns.append(cells(facts))
        except (KeyError, TypeError, AttributeError):  # of a version that writes this otherwise
            columns.append({})
    names: Iterable[str] = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in names]
    return PageTable(caption, [first, *(label for label, _ in reports)], rows)


def _with(value: float, interval: Sequence[float | None] | None) -> str:
    around = bounds(interval)
    return f"{value:+.3f}" + ("" if around == NONE else f" ({around})")


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3f}"


def _plain(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
