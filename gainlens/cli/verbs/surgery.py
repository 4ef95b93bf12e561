"""``gainlens surgery``: cut more and more key dimensions and measure the loss."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.ablation.modes import get_mode
from gainlens.analysis import rise_by_position, surgery
from gainlens.analysis.damage_by_position import BUCKETS
from gainlens.analysis.sweep.points import ORDER_TABLE, ORDERS, sweep_points
from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_text,
    next_line,
    open_model,
    resumable,
    several,
    text,
)
from gainlens.files import check_writable
from gainlens.probes.gains import KeyGains
from gainlens.probes.probe import DEFAULT_SCORES, probe_gains

HELP = "cut more and more key dimensions, with controls, and measure the loss"
EXAMPLES = [
    "gainlens surgery --model smollm2 --gains gains.safetensors --fractions 0.25,0.5",
    "gainlens surgery --model smollm2 --score fisher --scope layer --mode mean --out mean.json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", "gains", "fractions", n_docs=16, length=None, score="qk")
    add(parser, "unit", "mode", scope="head")
    parser.add_argument(
        "--orders",
        type=several(ORDER_TABLE),
        default=ORDERS,
        help=f"what is cut first, of {', '.join(ORDER_TABLE)}; all but quietest are controls",
    )
    add(parser, "seeds", "margin")
    add_last(parser, "surgery.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sweep and write one JSON file; resume from ``.part`` if the process was killed."""
    out = Path(options.out)
    check_writable(out.parent)
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    names = (options.score,), (options.scope,), options.unit, options.mode
    sweep_points(options.fractions, options.orders, seeds, *names)
    probed = 0 if options.gains else options.n_docs
    check_text(options.text, calibration=probed, validation=options.n_docs)
    gains = KeyGains.load(options.gains) if options.gains else None
    part = out.with_name(f"{out.name}.part")
    model = open_model(options)
    if gains is None:
        scores = tuple(dict.fromkeys((*DEFAULT_SCORES, options.score)))
        gains = probe_gains(model, text(options, model, "calibration"), scores)
    validation = text(options, model, "validation")
    with resumable(part):
        curve = surgery(
            model,
            validation,
            gains,
            options.fractions,
            score=options.score,
            scope=options.scope,
            unit=options.unit,
            mode=options.mode,
            orders=options.orders,
            seeds=seeds,
            out=part,
        )
    curve.save(out)
    part.unlink()
    cut = sorted({p.fraction for p in curve.points if p.order == "quietest"})
    verdicts = curve.verdicts_together([(curve.index_of(f), options.margin) for f in cut])
    lines = [f"{out}: {curve!r}"]
    for row in curve.table():
        seed = "" if row["seed"] is None else f" seed {row['seed']}"
        low, high = row["interval"]
        lines.append(
            f"{row['fraction']:6.0%}  {row['order']}{seed}: {row['delta']:+.4f} nats "
            f"[{low:+.4f}, {high:+.4f}]"
        )
    lines += [repr(verdict) for verdict in verdicts]
    rise = None
    if max(curve.lengths) > BUCKETS[1] and not get_mode(options.mode).takes_donors:
        cuts = {
            f"{fraction:.0%}": curve.points[curve.index_of(fraction)]
            .mask(gains)
            .in_mode(options.mode, gains=gains)
            for fraction in cut
        }
        rise = rise_by_position(model, validation, cuts)
        lines += [f"by position, {line}" for line in rise.lines()]
    held = [f for f, verdict in zip(cut, verdicts, strict=True) if verdict.status == "holds"]
    if cut:
        chosen = {"score": options.score, "scope": options.scope, "gains": options.gains}
        lines.append(next_line(options, "slim", fraction=max(held, default=cut[0]), **chosen))
    return {
        "out": str(out),
        "table": curve.table(),
        "by_position": None if rise is None else rise.to_json(),
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "lines": lines,
    }
