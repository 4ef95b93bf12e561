"""Who gets how much of the same total: pairs and slots shared out evenly, or by predicted damage.

    python benchmarks/budgets.py [--fraction 0.5]

Every row keeps the same number of key dimensions, is fitted on the same calibration text, and is
judged on the same validation documents of 256 tokens. Pairs: each head keeps as many (``head``),
each layer does (``layer``), or only the model does (``model``), by ``fisher``. Slots per layer: all
layers get as many (``even``), or those get them where they are predicted to save most
(``damage``). Rows that are done stay in ``--cache``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from healing_text import LENGTHS, SEEN
from slots import apart, described, judges

import gainlens as gl
from gainlens.ablation import fit_slots, refit
from gainlens.ablation.recipe import ranking_gains
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.overlap import document_identities
from gainlens.environment import environment
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.loss_rise import rise_verdicts
from gainlens.stats.verdicts import MARGIN
from gainlens.training.student import Student

ROWS = {
    "pairs, every head as many": ("pairs", "head"),
    "pairs, every layer as many": ("pairs", "layer"),
    "pairs, by damage over the model": ("pairs", "model"),
    "slots per layer, every layer as many": ("slots", "even"),
    "slots per layer, by damage over the model": ("slots", "damage"),
}


def main() -> None:
    """Fit every row, judge it, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--calibration", type=int, default=32, help="documents, of both texts")
    parser.add_argument("--judge", type=int, default=50, help="documents of each text")
    parser.add_argument("--long", type=int, default=1, help="not judged here")
    parser.add_argument("--rounds", type=int, default=6, help="of the fit, at most")
    parser.add_argument(
        "--stride", type=int, default=16, help="every how many queries one is fitted"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=cache_root() / "budgets")
    parser.add_argument("--out", type=Path, default=Path("docs/results/budgets.json"))
    args = parser.parse_args()
    begun = time.time()
    args.cache.mkdir(parents=True, exist_ok=True)
    bridge = gl.load_model(args.model)
    calibration = gl.load_tokens(SEEN, bridge, n_docs=args.calibration, length=LENGTHS)
    short, _ = judges(args, bridge)
    used = document_identities(calibration, bridge.tokenizer)
    short = short.chosen(apart(short, used, bridge.tokenizer))
    plain = load_hf(args.model)
    student = Student(plain, gl.SlicePlan.identity(plain))
    before = np.concatenate([student.losses(batch) for batch in student.batches(short)])
    gains = None
    rows: dict[str, Any] = {}
    for name, how in ROWS.items():
        judge = text_fingerprint(list(short))[:12]
        asked = [args.fraction, args.calibration, judge, args.rounds, args.stride, *how]
        kept = args.cache / ("_".join(str(part) for part in asked) + ".json")
        if not kept.exists():
            gains = gains or ranking_gains(bridge, calibration)
            write_json(kept, row_of(args, bridge, plain, calibration, gains, how, short, before))
        rows[name] = read_json(kept)
        shown = {text: round(v["estimate"], 4) for text, v in rows[name]["verdicts"].items()}
        print(f"{time.time() - begun:5.0f} s  {name:42s} {shown}", flush=True)
    write_json(
        args.out,
        {
            "what": "rise of the validation loss, nats per token, at equal key dimensions in all",
            "model": args.model,
            "fraction": args.fraction,
            "text": {"calibration": described(calibration), "short": described(short)},
            "rows": rows,
            "seed": args.seed,
            **environment(),
        },
    )


def row_of(args, bridge, plain, calibration, gains, how, short, before) -> dict[str, Any]:
    """Fit one row and judge it."""
    kind, share = how
    fit = {"rounds": args.rounds, "stride": args.stride}
    if kind == "pairs":
        mask = gl.KeyMask.quietest(gains, args.fraction, "fisher", share)
        cut = refit(bridge, calibration, mask, **fit)
    else:
        cut = fit_slots(bridge, calibration, gains, args.fraction, "layer", budget=share, **fit)
    student = Student(plain, gl.SlicePlan.from_cut(cut))
    after = np.concatenate([student.losses(batch) for batch in student.batches(short)])
    verdicts = rise_verdicts(
        after - before,
        args.fraction,
        MARGIN,
        trained=False,
        domains=short.domains,
        lengths=short.lengths,
    )
    layers = cut.keep.flatten(1).sum(1).double()
    return {
        "verdicts": {name: verdict.to_json() for name, verdict in verdicts.items()},
        "kept_by_layer": layers.int().tolist(),
        "kept": int(layers.sum()),
        "misfit_held_out": cut.facts.get("held_out_after"),
    }


if __name__ == "__main__":
    main()
