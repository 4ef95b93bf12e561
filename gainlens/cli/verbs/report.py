"""``gainlens report``: probe, surgery and map of one model, as a folder that a person opens."""

from __future__ import annotations

import argparse
from typing import Any

from gainlens.cli.verbs.common import add_text_arguments, fractions, open_model
from gainlens.report.build import Plan, build_report, check_report_folder

HELP = "probe, surgery and map of a model, as a folder with index.html"
OUT = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=16)
    parser.add_argument("--fractions", type=fractions, default=(0.25, 0.5, 0.6, 0.8))
    parser.add_argument("--score", default="qk", help="which gain ranks the units")
    parser.add_argument("--seeds", type=int, default=3, help="how many random controls")
    parser.add_argument(
        "--refit-rounds",
        type=int,
        default=2,
        help="rounds of the least-squares refit of the cut at 50%% (0: none)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the report folder."""
    plan = Plan(
        model=options.model,
        text=options.text,
        n_docs=options.n_docs,
        length=options.length,
        fractions=options.fractions,
        score=options.score,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        refit_rounds=options.refit_rounds,
        seed=options.seed,
        device=options.device,
    )
    out = check_report_folder(options.out)
    plan.check()
    import sys

    sys.stderr.write("\n".join(plan.describe()) + "\n")
    result = build_report(open_model(options), plan, out)
    lines = [
        f"{claim['status']:>9}  {claim['quote']}: {claim['number']}" for claim in result["claims"]
    ]
    return {**result, "lines": [*lines, f"open {out / 'index.html'}"]}
