"""The claims across recorded models, and whether a score predicts what a cut costs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from gainlens.ablation import best_cut
from gainlens.report.build import Plan
from gainlens.report.compare_tables import (
    all_tables,
    claims_of,
    claims_table,
)
from gainlens.report.page import PageTable
from parts.markdown import RESULTS, details, not_yet, provenance, recorded, table

RECORDS = {
    "SmolLM2-135M": "report_smollm2.json",
    "Gemma 3 270M": "report_gemma3-270m.json",
    "tiny": "report_tiny.json",
    "GPT-2, from scratch": "report_gpt2.json",
}
"""Reports of the page, by the model's name there."""
HOME = re.compile(r"(?<![\w.~-])/(root|home/[^/\s]+|Users/[^/\s]+)/")
"""Home folder of whoever made a record."""
TOLD = 0.5
"""Ceiling below which a model's documents are too few to compare scores."""
DEFAULT = inspect.signature(best_cut).parameters["score"].default
NAMES = {
    "smollm2": "SmolLM2-135M",
    "gemma3-270m": "Gemma 3 270M",
    "tiny": "tiny",
    "gpt2": "GPT-2, from scratch",
}


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
    """What each model is, what half of its keys is worth, and its map."""
    return _tables(lambda found: found[:3])


def cuts() -> str:
    """Cuts, texts, positions and tasks."""
    return _tables(lambda found: found[3:])


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
            f"- {name}: `{HOME.sub('~/', Plan(**plan).command())}`, {facts['seconds']:,.0f} s, "
            f"gainlens "
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
        + f"\n\n{_across(models, scores)}\n\n{measured} Source: `docs/results/prediction.json`, "
        + "`python benchmarks/prediction.py --model NAME`."
    )


def _across(models: dict[str, Any], scores: list[str]) -> str:
    """What was reached on each model, and which score does best over all of them."""
    reached = []
    for name, entry in models.items():
        best, ceiling = entry["results"]["best"], entry["results"]["noise"]["ceiling"]
        of = "" if ceiling is None else f", where a perfect score could reach {ceiling:.2f}"
        figure = entry["results"]["scores"][best]["spearman"]
        reached.append(f"{figure:+.2f} on {NAMES.get(name, name)} ({best}{of})")
    told = [e for e in models.values() if (e["results"]["noise"]["ceiling"] or 0) >= TOLD]
    means = {
        key: {
            score: sum(e["results"]["scores"][score][key] for e in told) / len(told)
            for score in scores
        }
        for key in ("spearman", "within_layers", "with_size")
    }
    said = {
        "spearman": "with the rise",
        "within_layers": "within layers",
        "with_size": "with its size",
    }
    best_of = [
        f"{said[key]} **{best}** ({found[best]:+.2f}; `{DEFAULT}` {found[DEFAULT]:+.2f})"
        for key, found in means.items()
        for best in [max(found, key=found.__getitem__)]
    ]
    return (
        f"Reached: {'; '.join(reached)}. Best on average over the {len(told)} models "
        f"with a ceiling of {TOLD:g} or more: "
        f"{', '.join(best_of)}. `{DEFAULT}` ranks for `best_cut`, by default."
    )


def control() -> str:
    """What the control without rotation is, and the loss that it was trained to."""
    facts = recorded(RESULTS / "gpt2_control.json")
    if facts is None:
        return not_yet("the control", "python benchmarks/gpt2_control.py")
    text = facts["text"]
    losses = ", ".join(
        f"{row['loss']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f}) on "
        f"{row['documents']} documents of {name}"
        for name, row in facts["loss"].items()
    )
    return (
        f"{facts['model']}, trained from scratch on {facts['tokens']:,} tokens of "
        f"{' and '.join(text['trained_on'].split(','))} in rows of {text['length']}. "
        f"Its tokenizer is that of {text['tokenizer']}. Validation loss in nats per token, with "
        f"95% intervals: {losses}; a uniform guess costs "
        f"{facts['uniform_guess']:.2f}. {provenance(facts, 'docs/results/gpt2_control.json')}"
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
