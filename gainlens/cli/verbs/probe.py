"""``gainlens probe``: gather key gains over a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.cli.verbs.common import add_text_arguments, open_model, text
from gainlens.files import check_writable
from gainlens.training.processes import Processes, gather_gains

HELP = "gather the gain of every key dimension over a text"
OUT = "gains.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=32)
    parser.add_argument("--split", default="calibration", help="calibration, training, validation")
    parser.add_argument("--scores", default="rms,std,qk", help="which scores to gather for")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Probe, with all processes that were launched, and write one safetensors file."""
    out = Path(options.out)
    check_writable(out.parent)
    model = open_model(options)
    names = tuple(name.strip() for name in options.scores.split(",") if name.strip())
    processes = Processes.here()
    tokens = text(options, model, options.split)
    gains = gather_gains(model, tokens, names, progress=processes.first)
    if not processes.first:  # which alone writes and speaks
        options.json = False
        return {}
    gains.save(out)
    return {
        "out": str(out),
        "model": gains.model.architecture,
        "shape": list(gains.shape),
        "n_tokens": gains.n_tokens,
        "n_documents": gains.n_documents,
        "lines": [f"{out}: {gains!r}"],
    }
