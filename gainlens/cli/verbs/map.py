"""``gainlens map``: do all layers use the same key dimensions?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.analysis import coordinate_map
from gainlens.cli.verbs.common import add_text_arguments, gains_of, open_model
from gainlens.files import check_writable, write_json

HELP = "compare the gains of all layers with each other and with chance"
OUT = "map.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=32)
    parser.add_argument("--gains", help="a gains file; without it the calibration text is probed")
    parser.add_argument("--score", default="rms", help="which gain is compared")
    parser.add_argument("--permutations", type=int, default=1000)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Map and write one JSON file."""
    out = Path(options.out)
    check_writable(out.parent)
    gains = gains_of(options, None if options.gains else open_model(options))
    cmap = coordinate_map(
        gains, options.score, n_permutations=options.permutations, seed=options.seed
    )
    result = {"summary": cmap.summary(), "verdict": cmap.verdict().to_json(), "facts": cmap.facts}
    write_json(out, result)
    return {**result, "out": str(out), "lines": [f"{out}: {cmap!r}", repr(cmap.verdict())]}
