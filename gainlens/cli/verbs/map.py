"""``gainlens map``: do all layers use the same key dimensions?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.analysis import coordinate_map
from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_text,
    next_line,
    open_model,
    text,
    whole,
)
from gainlens.files import check_writable, write_json
from gainlens.probes import KeyGains, probe_gains
from gainlens.probes.probe import DEFAULT_SCORES

HELP = "compare the gains of all layers with each other and with chance"
EXAMPLES = ["gainlens map --gains gains.safetensors --score qk --out map.json"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", "gains", n_docs=32, length=None, score="rms")
    parser.add_argument(
        "--permutations", type=whole(1), default=1000, help="permutations for the null distribution"
    )
    add_last(parser, "map.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the map and write one JSON file."""
    out = Path(options.out)
    check_writable(out.parent)
    if options.gains:
        gains = KeyGains.load(options.gains)
    else:
        check_text(options.text, calibration=options.n_docs)
        model = open_model(options)
        scores = tuple(dict.fromkeys((*DEFAULT_SCORES, options.score)))
        gains = probe_gains(model, text(options, model, "calibration"), scores)
    cmap = coordinate_map(
        gains, options.score, n_permutations=options.permutations, seed=options.seed
    )
    result = {"summary": cmap.summary(), "verdict": cmap.verdict().to_json(), "facts": cmap.facts}
    write_json(out, result)
    ranked = None if "qk" in gains.scores else options.score
    lines = [f"{out}: {cmap!r}", repr(cmap.verdict()), next_line(options, "surgery", score=ranked)]
    return {**result, "out": str(out), "lines": lines}
