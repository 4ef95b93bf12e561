"""The claims across recorded models, and whether a score predicts what a cut costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gainlens.report.build import Plan
from gainlens.report.compare_tables import (
    all_tables,
    claims_of,
    claims_table,
)
from gainlens.report.page import PageTable
from parts.markdown import RESULTS, details, not_yet, recorded, table

RECORDS = {
    "SmolLM2-135M": "report_smollm2.json",
    "Gemma 3 270M": "report_gemma3-270m.json",
    "tiny": "report_tiny.json",
}
"""Reports of the page, by the model's name there."""
NAMES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M", "tiny": "tiny"}


def reports() -> list[tuple[str, dict[str, Any]]]:
    """The recorded reports, by name; those that nobody has recorded are left out."""
    found = ((name, recorded(RESULTS / file)) for name, file in RECORDS.items())
    return [(name, facts) for name, facts in found if facts is not None]


def claims() -> str:
    """Every claim in every model."""
    named = reports()
    if len(named) < 2:
        return not_yet("the comparison", "gainlens report")
    quotes = dict.fromkeys(quote for _, facts in named for quote in claims_of(facts))
    parts = []
    for quote in quotes:
        found = claims_table(quote, named)
        rows = [[row[0], f"**{row[1]}**", *row[2:]] for row in found.rows]
        parts.append(f"**“{quote}”**\n\n" + table(found.head, rows))
    return "\n\n".join([*parts, _made(named)])


def numbers() -> str:
    """What each model is, and its map."""
    return _tables(lambda found: found[:2])


def cuts() -> str:
    """Cuts, texts, positions and tasks."""
    return _tables(lambda found: found[2:])


def _tables(choose: Callable[[list[PageTable]], list[PageTable]]) -> str:
    named = reports()
    if len(named) < 2:
        return not_yet("the comparison", "gainlens report")
    parts = []
    for found in choose(all_tables(named)):
        made = table(found.head, found.rows)
        long = len(found.rows) > 20
        parts.append(details(found.caption, made) if long else f"**{found.caption}**\n\n{made}")
    return "\n\n".join(parts)


def _made(named: list[tuple[str, dict[str, Any]]]) -> str:
    """How each record was made."""
    lines = []
    for name, facts in named:
        plan = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["plan"].items()}
        lines.append(
            f"- {name}: `{Plan(**plan).command()}`, {facts['seconds']:,.0f} s, gainlens "
            f"{facts['versions']['gainlens']}, torch {facts['versions']['torch']}, "
            f"{facts['machine']['processor']} (`docs/results/{RECORDS[name]}`)"
        )
    missing = [name for name in RECORDS if name not in dict(named)]
    lines += [f"- {name}: not recorded yet" for name in missing]
    return "How the records were made:\n\n" + "\n".join(lines)


def prediction() -> str:
    """Rank correlation of each score with the measured rise of cutting one unit."""
    facts = recorded(RESULTS / "prediction.json")
    if facts is None:
        return not_yet("the prediction", "python benchmarks/prediction.py")
    models = facts["models"]
    scores = list(dict.fromkeys(s for entry in models.values() for s in entry["results"]["scores"]))
    rows = []
    for score in scores:
        cells = [score]
        for entry in models.values():
            row = entry["results"]["scores"][score]
            shown = f"{row['spearman']:+.2f} ({_short(row['interval'])})"
            cells.append(f"**{shown}**" if score == entry["results"]["best"] else shown)
            cells += [f"{row['within_layers']:+.2f}", f"{row['with_size']:+.2f}"]
        rows.append(cells)
    rows.append(["ceiling", *(c for e in models.values() for c in (_ceiling(e), "", ""))])
    head = ["score"]
    for name in models:
        head += [f"{NAMES.get(name, name)}: rise", "within layers", "size"]
    measured = " ".join(
        f"{NAMES.get(name, name)}: {len(e['units'])} of {e['all_units']:,} {e['unit']}s, "
        f"{e['documents']} documents of {e['length']} tokens of {e['text']} "
        f"({e['calibration_documents']} others gave the scores); rises from "
        f"{e['results']['rise_quantiles'][0]:+.4f} to {e['results']['rise_quantiles'][-1]:+.4f} "
        f"nats, median {e['results']['rise_quantiles'][2]:+.5f}, "
        f"{e['results']['share_negative']:.0%} below zero."
        for name, e in models.items()
    )
    return (
        table(head, rows)
        + f"\n\n{measured} Source: `docs/results/prediction.json`, "
        + "`python benchmarks/prediction.py --model NAME`."
    )


def mapped() -> str:
    """Private memory of probing a model whose weights stay in their files."""
    facts = recorded(RESULTS / "mapped_weights.json")
    if facts is None:
        return not_yet("the memory", "python benchmarks/mapped_weights.py")
    steps = facts["steps"]
    start = steps[0]["private_mb"]
    rows = [(s["stage"], f"{s['peak_mb'] - start:,} MB") for s in steps[1:]]
    return (
        table(["step", "private memory at its peak, beyond the imports"], rows)
        + f"\n\n{facts['model']}: {facts['n_weights'] / 1e9:.2f} billion weights, "
        f"{facts['weights_mb']:,} MB; {facts['documents']} documents of {facts['length']} tokens. "
        "Source: `docs/results/mapped_weights.json`, `python benchmarks/mapped_weights.py`."
    )


def _ceiling(entry: dict[str, Any]) -> str:
    noise = entry["results"]["noise"]
    if noise["ceiling"] is None:
        return "–"
    return f"{noise['ceiling']:.2f} (halves {noise['halves']:+.2f})"


def _short(pair: list[float]) -> str:
    return f"{pair[0]:+.2f} to {pair[1]:+.2f}"
