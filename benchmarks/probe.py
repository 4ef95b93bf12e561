"""What probing costs beside the bare forward pass and beside run_with_cache, on the real model.

    python benchmarks/probe.py --out docs/results/probe.json

Times are medians of interleaved repetitions in one process; memory is the peak of a fresh process
per case and number of batches, so that growth shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import gainlens as gl
from gainlens.environment import environment
from gainlens.files import read_json, write_json
from gainlens.model.forward import forward_layers

ROWS, LENGTH = 4, 256
CASES = ("bare", "probed", "run_with_cache keys", "run_with_cache all")


def run_case(model, tokens, case: str) -> None:
    """One pass over ``tokens`` in batches of ``ROWS`` documents."""
    if case == "probed":
        gl.probe_gains(model, tokens, tokens_per_batch=ROWS * LENGTH, progress=False)
        return
    kept = []
    for batch in tokens.split(ROWS):
        if case == "bare":
            forward_layers(model, batch)
            continue
        names = None
        if case.endswith("keys"):
            names = [
                f"blocks.{i}.attn.hook_{x}"
                for i in range(model.cfg.n_layers)
                for x in ("k", "rot_k", "q", "rot_q")
            ]
        with torch.inference_mode():
            # What a person does who wants all tokens' keys: keep every batch's cache.
            kept.append(model.run_with_cache(batch, return_type=None, names_filter=names)[1])


def tokens_for(model, n_batches: int) -> torch.Tensor:
    """Speeches of the calibration split."""
    return gl.load_tokens("sotu", model, n_docs=ROWS * n_batches, length=LENGTH)


def own_peak_mb() -> float:
    """Peak resident memory of this program alone.

    ``ru_maxrss`` survives exec on Linux, so a child would report its parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmHWM in /proc/self/status: memory is measured on Linux only")


def peak_memory(name: str, case: str, n_batches: int) -> float:
    """Peak resident memory in MB of a process that does only this."""
    command = [sys.executable, __file__, "--model", name, "--child", case, str(n_batches)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])["peak_mb"]


def all_memory(name: str) -> dict[str, dict[str, float]]:
    """Peaks by case and number of batches; eight of every activation don't fit into 24 GB."""
    counts = {case: (1, 2, 4) if case.endswith("all") else (1, 4, 8) for case in CASES}
    return {
        case: {str(n): round(peak_memory(name, case, n), 1) for n in counts[case]} for case in CASES
    }


def show(result: dict) -> None:
    """Print the result as a table."""
    print(f"{'case':22} {'seconds':>8} {'× bare':>7}   peak MB (after so many batches)")
    for case in CASES:
        peaks = ", ".join(f"{mb:.0f} ({n})" for n, mb in result["peak_mb_by_batches"][case].items())
        seconds, ratio = result["seconds"][case], result["ratio_to_bare"][case]
        print(f"{case:22} {seconds:8.3f} {ratio:7.3f}   {peaks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="docs/results/probe.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--memory-only", action="store_true", help="keep the times of the file, measure memory anew"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = gl.load_model(options.model)
    if options.child:
        case, n_batches = options.child
        run_case(model, tokens_for(model, int(n_batches)), case)
        peak = own_peak_mb()
        print(json.dumps({"peak_mb": peak}))
        return
    memory = all_memory(options.model)
    if options.memory_only:
        result = {**read_json(options.out), "peak_mb_by_batches": memory}
        write_json(options.out, result)
        show(result)
        return
    tokens = tokens_for(model, 2)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for case in CASES:
        run_case(model, tokens[:ROWS], case)
    for _ in range(options.repeats):
        for case in CASES:
            start = time.perf_counter()
            run_case(model, tokens, case)
            times[case].append(time.perf_counter() - start)
    medians = {case: statistics.median(values) for case, values in times.items()}
    ratios = {
        case: statistics.median(a / b for a, b in zip(values, times["bare"], strict=True))
        for case, values in times.items()
    }
    result = {
        "command": "python benchmarks/probe.py",
        "model": options.model,
        "text": f"sotu calibration, {tokens.shape[0]} documents × {LENGTH} tokens",
        "repeats": options.repeats,
        "seconds": {case: round(value, 4) for case, value in medians.items()},
        "ratio_to_bare": {case: round(value, 4) for case, value in ratios.items()},
        "peak_mb_by_batches": memory,
        "target": "probed at most 1.10 times bare; peak memory does not grow with batches",
        **environment(),
    }
    write_json(options.out, result)
    show(result)


if __name__ == "__main__":
    main()
