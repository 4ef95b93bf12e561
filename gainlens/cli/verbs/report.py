"""``gainlens report``: probe, surgery and map of one model, as a folder with a web page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_text,
    length_for,
    next_line,
    open_model,
    whole,
)
from gainlens.errors import InputError
from gainlens.model.context import LENGTH
from gainlens.report.build import Plan, build_report, check_report_folder
from gainlens.report.compare import compare_reports

HELP = "probe, surgery and map of a model, as a folder with index.html"
EXAMPLES = [
    "gainlens report --model smollm2 --text sotu --out report",
    "gainlens report --model smollm2 --text sotu,stdlib,pydoc --n-docs 18 --out report",
    "gainlens report --compare smollm2/ gemma3/ --out comparison",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", "fractions", n_docs=16, length=None, score="qk")
    add(parser, "seeds", "refit_rounds")
    parser.add_argument(
        "--context",
        type=whole(128),
        default=Plan.context,
        help="tokens of the documents for the rise by position, at most",
    )
    parser.add_argument(
        "--task-prompts",
        type=whole(0),
        default=Plan.task_prompts,
        help="prompts per task; 0: no tasks",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FOLDER",
        help="compare finished reports claim by claim, into --out; no model is loaded, and the "
        "other options are not used",
    )
    add_last(parser, "report")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the report folder, or the comparison of finished ones."""
    if options.compare is not None:
        return _compare(options)
    if options.length == "mixed":
        raise InputError("--length mixed: expected a number; --context is that of long documents")
    plan = Plan(
        model=options.model,
        text=options.text,
        n_docs=options.n_docs,
        length=options.length or LENGTH,
        fractions=options.fractions,
        score=options.score,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        refit_rounds=options.refit_rounds,
        context=options.context,
        task_prompts=options.task_prompts,
        seed=options.seed,
        device=options.device,
    )
    out = check_report_folder(options.out)
    plan.check()
    check_text(options.text, calibration=options.n_docs, validation=options.n_docs)
    model = open_model(options)
    plan = replace(plan, length=length_for(options, model))
    sys.stderr.write("\n".join(plan.describe()) + "\n")
    result = build_report(model, plan, out)
    lines = [
        f"{claim['status']:>9}  {claim['quote']}: {claim['number']}" for claim in result["claims"]
    ]
    step = result["next"]
    given = {"score": None} if step["verb"] != "report" else {}
    lines += [
        f"open {out / 'index.html'}",
        next_line(options, step["verb"], n_docs=step["n_docs"], **given),
    ]
    return {**result, "lines": lines}


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    result = compare_reports(options.compare, options.out)
    lines = [f"{c['status']:>9}  {c['report']}: {c['quote']}" for c in result["claims"]]
    lines += [f"differs: {sentence}" for sentence in result["differences"]]
    return {**result, "lines": [*lines, f"open {Path(options.out) / 'index.html'}"]}
