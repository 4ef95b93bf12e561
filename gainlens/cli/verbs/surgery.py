"""``gainlens surgery``: cut more and more key dimensions and measure the loss."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from gainlens.ablation.key_mask import SCOPES
from gainlens.ablation.modes import get_mode
from gainlens.analysis import surgery
from gainlens.analysis.sweep.points import ORDERS, sweep_points
from gainlens.cli.verbs.common import (
    add_text_arguments,
    fractions,
    open_model,
    text,
)
from gainlens.errors import InputError
from gainlens.files import check_writable
from gainlens.probes.gains import UNITS, KeyGains
from gainlens.probes.probe import DEFAULT_SCORES, probe_gains
from gainlens.probes.scores import get_score

HELP = "cut more and more key dimensions, with controls, and measure the loss"
OUT = "surgery.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=16)
    parser.add_argument("--gains", help="a gains file; without it the calibration text is probed")
    parser.add_argument("--fractions", type=fractions, default=(0.25, 0.5, 0.6, 0.8))
    parser.add_argument("--score", default="qk", help="which gain ranks the units")
    parser.add_argument("--scope", default="head", help="head, layer, model, universal")
    parser.add_argument("--unit", default="pair", help="pair or dim")
    parser.add_argument("--mode", default="zero", help="what a cut dimension carries")
    parser.add_argument("--orders", default=",".join(ORDERS), help="quietest and controls")
    parser.add_argument("--seeds", type=int, default=3, help="how many random controls")
    parser.add_argument("--margin", type=float, default=0.02, help="nats that count as flat")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sweep and write one JSON file; after a kill, go on with what was done (``.part``)."""
    out = Path(options.out)
    check_writable(out.parent)
    _check(options)
    part = out.with_name(f"{out.name}.part")
    model = open_model(options)
    gains = _gains(options, model)
    curve = surgery(
        model,
        text(options, model, "validation"),
        gains,
        options.fractions,
        score=options.score,
        scope=options.scope,
        unit=options.unit,
        mode=options.mode,
        orders=_orders(options),
        seeds=_seeds(options),
        out=part,
    )
    curve.save(out)
    part.unlink()
    verdicts = [
        curve.verdict(fraction, options.margin)
        for fraction in sorted({p.fraction for p in curve.points if p.order == "quietest"})
    ]
    lines = [f"{out}: {curve!r}"]
    for row in curve.table():
        seed = "" if row["seed"] is None else f" seed {row['seed']}"
        low, high = row["interval"]
        lines.append(
            f"{row['fraction']:6.0%}  {row['order']}{seed}: {row['delta']:+.4f} nats "
            f"[{low:+.4f}, {high:+.4f}]"
        )
    lines += [repr(verdict) for verdict in verdicts]
    return {
        "out": str(out),
        "table": curve.table(),
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "lines": lines,
    }


def _check(options: argparse.Namespace) -> None:
    """What would otherwise be found out after minutes of loading, probing or sweeping."""
    if not options.margin > 0 or not math.isfinite(options.margin):
        raise InputError(f"--margin {options.margin}: expected a number of nats above 0")
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: expected at least 1")
    if options.scope not in SCOPES:
        raise InputError(f"--scope {options.scope!r} is not one of {', '.join(SCOPES)}")
    if options.unit not in UNITS:
        raise InputError(f"--unit {options.unit!r} is not one of {', '.join(UNITS)}")
    if options.mode == "patch":
        raise InputError("--mode patch needs a cached run of one prompt: see gl.patch_keys")
    get_mode(options.mode)
    get_score(options.score)
    names = (options.score,), (options.scope,), options.unit, options.mode
    sweep_points(options.fractions, _orders(options), _seeds(options), *names)


def _orders(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name.strip() for name in options.orders.split(","))


def _seeds(options: argparse.Namespace) -> tuple[int, ...]:
    return tuple(range(options.seed, options.seed + options.seeds))


def _gains(options: argparse.Namespace, model: Any) -> KeyGains:
    """Gains from ``--gains``, or probed on the calibration split with what ``--score`` needs."""
    if options.gains:
        return KeyGains.load(options.gains)
    scores = tuple(dict.fromkeys((*DEFAULT_SCORES, options.score)))
    return probe_gains(model, text(options, model, "calibration"), scores)
