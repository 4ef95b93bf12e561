"""``gainlens bench``: cost of probing and cutting relative to a bare forward pass."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gainlens.ablation import KeyMask, ablate
from gainlens.cli.verbs.common import add, add_last, check_text, open_model, text, whole
from gainlens.data.texts import as_rows
from gainlens.environment import environment
from gainlens.errors import InputError
from gainlens.files import check_writable, write_json
from gainlens.model.forward import forward_layers
from gainlens.probes import probe_gains

HELP = "time the bare, the probed and the ablated forward pass in alternation"
EXAMPLES = ["gainlens bench --model smollm2 --repeats 5 --out bench.json"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", n_docs=4, length=None)
    parser.add_argument("--repeats", type=whole(1), default=5, help="rounds; medians are reported")
    add_last(parser, "bench.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time and write one JSON file; ratios are relative to the bare pass of the same round."""
    out = Path(options.out)
    if options.length == "mixed":
        raise InputError("--length mixed: expected one length, whose passes are timed")
    check_writable(out.parent)
    check_text(options.text, calibration=options.n_docs)
    model = open_model(options)
    tokens = as_rows(text(options, model, "calibration"))
    # The first probe also finds the sites, once per model; do not include that in the timing.
    mask = KeyMask.random(probe_gains(model, tokens, progress=False), 0.5, options.seed)

    def ablated() -> None:
        with ablate(model, mask):
            forward_layers(model, tokens)

    cases: dict[str, Callable[[], object]] = {
        "bare": lambda: forward_layers(model, tokens),
        "probed": lambda: probe_gains(
            model, tokens, tokens_per_batch=tokens.numel(), progress=False
        ),
        "ablated": ablated,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds["bare"], strict=True))
        for name, times in seconds.items()
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "model": options.model,
        "text": options.text,
        "tokens": tokens.numel(),
        "repeats": options.repeats,
        "seconds": medians,
        "ratio_to_bare": ratios,
        **environment(),
    }
    write_json(out, result)
    lines = [f"{name:8} {medians[name]:8.4f} s  {ratios[name]:6.3f} × bare" for name in cases]
    return {**result, "out": str(out), "lines": lines}
