"""``gainlens train``: heal a cut at virtual width, evaluate it, write the trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_device,
    check_text,
    fraction,
    nats,
    next_line,
    not_negative,
    resumable,
    several,
    whole,
)
from gainlens.files import check_free
from gainlens.training.find import TRAINABLE
from gainlens.training.healing import Healing, heal
from gainlens.training.objectives import OBJECTIVES
from gainlens.training.settings import Settings
from gainlens.training.student import PRECISIONS

HELP = "heal a cut: train what a plan keeps, evaluate it, write the trained model"
EXAMPLES = [
    "gainlens train --model smollm2 --fraction 0.5 --scope layer --steps 80 --out healed",
    "gainlens train --model smollm2 --fraction 0.75 --rounds 3 --steps 400 --out healed-in-rounds",
]
PLAIN = Settings(steps=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, with the defaults of ``Settings`` except for ``--lr``."""
    add(parser, "model", "text", n_docs=24, length=None)
    parser.add_argument("--plan", help="a plan file, instead of --fraction and --scope")
    add(parser, "fraction", "refit_rounds", score="fisher", scope="layer")
    parser.add_argument(
        "--value-fraction", type=fraction, help="share of value dimensions to cut (default: none)"
    )
    parser.add_argument(
        "--rounds", type=whole(1), default=1, help="number of rounds of cutting and healing"
    )
    parser.add_argument(
        "--steps", type=whole(1), default=200, help="optimiser steps over all rounds"
    )
    parser.add_argument(
        "--train",
        type=several(TRAINABLE),
        default=("q", "k", "v", "o"),
        help=f"weights to train, of {', '.join(TRAINABLE)}",
    )
    parser.add_argument(
        "--objective",
        choices=tuple(OBJECTIVES),
        default=PLAIN.objective,
        help="the loss to minimise",
    )
    parser.add_argument("--batch", type=whole(1), default=PLAIN.batch, help="documents per step")
    parser.add_argument("--lr", type=nats, default=6e-4, help="learning rate of W_Q and W_K")
    parser.add_argument(
        "--other-lr", type=nats, help="learning rate of the rest (default: a third of --lr)"
    )
    parser.add_argument(
        "--weight-decay",
        type=not_negative,
        default=PLAIN.weight_decay,
        help="weight decay of the optimiser",
    )
    parser.add_argument(
        "--attention",
        type=not_negative,
        default=PLAIN.attention,
        help="weight of the divergence in attention, over all layers",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PLAIN.precision,
        help="precision of matrix products",
    )
    parser.add_argument(
        "--check-every", type=whole(1), default=PLAIN.check_every, help="steps between checks"
    )
    parser.add_argument(
        "--stop-margin", type=nats, help="stop when the monitored rise is shown to be below this"
    )
    parser.add_argument(
        "--monitor", type=whole(2), default=8, help="number of calibration documents to monitor"
    )
    add(parser, "margin", judge=32)
    parser.add_argument("--save-every", type=whole(1), default=20, help="steps between checkpoints")
    add_last(parser, "healed")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Heal; resume from ``OUT.part`` if the process was killed."""
    out = Path(options.out)
    given = vars(options)
    settings = Settings(**{k: v for k, v in given.items() if k in Settings.__dataclass_fields__})
    own = {k: v for k, v in given.items() if k in Healing.__dataclass_fields__}
    healing = Healing(settings=settings, **own)
    check_free(out)
    healing.check()
    check_device(options.device)
    calibration = options.n_docs + options.monitor
    check_text(options.text, calibration=calibration, training=1, validation=options.judge)
    with resumable(out.with_name(f"{out.name}.part")):
        found = heal(healing, out)
    if found is None:  # only the first process prints
        options.json = False
        return {}
    verdict, before = found["verdict"], found["untrained"]
    made = {"fraction": None, "score": None, "scope": None, "refit_rounds": None, "precision": None}
    lines = [
        f"{out}: {found['run']!r}",
        *(
            f"{name}: {row['estimate']:+.4f} nats on {row['n_documents']} validation documents"
            for name, row in before["validation"].items()
        ),
        repr(verdict),
        *(f"by position, {line}" for line in found["by_position"].lines()),
        next_line(options, "slim", model=out, plan=out / "plan.json", **made),
    ]
    return {
        "out": str(out),
        "untrained": before,
        "verdict": verdict.to_json(),
        "by_position": found["by_position"].to_json(),
        "model": options.model,
        "text": options.text,
        "lines": lines,
    }
