"""Probe, rank, cut and slim a model that is larger than the memory allowed.

    python benchmarks/larger_than_memory.py [--folder DIR] [--layers 32] [--refit]

A random Llama with the sizes of Mistral 7B (7.24 billion weights) is written as bfloat16 shards,
one per layer, and loaded with its weights on disk in float32, in which it would take 29 GB. A child
process does the work in a memory control group of 8 GB, which counts all of its memory and the page
cache of the files that it reads, as on a machine of that size; to make one takes root. The peak of
its resident memory (``ru_maxrss``, and ``VmHWM`` by stage) is recorded; it counts the pages of
mapped files as well. The same is done first with a small model, once from disk and once in memory,
and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mapped_weights import VOCABULARY, write_model

import gainlens as gl
from gainlens.environment import environment
from gainlens.files import write_json

MODEL, SLIM, STAGES = "model", "slim", "stages.json"
SMALL = {"d_model": 256, "d_mlp": 384, "layers": 2, "kv_heads": 4}
FRACTION = 0.5


def main() -> None:
    """Write a model, measure in a child process, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-mlp", type=int, default=14336)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--limit", type=float, default=8, help="GB of memory")
    parser.add_argument("--refit", action="store_true", help="refit as well, and slim the refit")
    parser.add_argument("--folder", help="for 30 GB of files; by default a temporary one")
    parser.add_argument("--out", default="docs/results/larger_than_memory.json")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        measure(Path(args.inside), args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as beside:
        folder = Path(beside)
        small = compare(folder / "small")
        print(small, flush=True)
        free = shutil.disk_usage(folder).free
        started, load = time.monotonic(), os.getloadavg()
        write_model(folder / MODEL, args)
        seconds = round(time.monotonic() - started, 1)
        print({"stage": "write the model", "seconds": seconds}, flush=True)
        forget_cache(folder / MODEL)
        peak = run(folder, args)
        stages = json.loads((folder / STAGES).read_text())
        write_json(
            args.out,
            {
                "what": "probe, rank, cut and slim of a model whose weights stay on disk",
                "model": f"random Llama, {args.layers} layers of {args.d_model}, MLP {args.d_mlp}, "
                f"32 query and {args.kv_heads} key heads, {VOCABULARY} tokens",
                "stored": "bfloat16",
                "computed": "float32",
                "documents": args.documents,
                "length": args.length,
                "fraction": FRACTION,
                "limit_gb": args.limit,
                "limit_is": "a memory control group, page cache included; GB are 2^30 bytes",
                "peak_is": "ru_maxrss of the process: resident memory with pages of mapped files, "
                "without the page cache",
                "peak_gb": round(peak, 2),
                "write_seconds": seconds,
                "free_disk_gb": round(free / 2**30),
                "load_average": {"before": load, "after": os.getloadavg()},
                "quiet": max(*load, *os.getloadavg()) < 1.5,
                **stages,
                "small": small,
                "seed": 0,
                **environment("accelerate", "safetensors"),
            },
        )


def run(folder: Path, args: argparse.Namespace) -> float:
    """The child process; its peak resident memory in GB."""
    options = ("documents", "length", "limit")
    command = [sys.executable, __file__, "--inside", str(folder)]
    command += [x for name in options for x in (f"--{name}", str(getattr(args, name)))]
    command += ["--refit"] if args.refit else []
    with memory_group(int(args.limit * 2**30)) as members:
        subprocess.run(command, check=True, preexec_fn=lambda: members.write_text(str(os.getpid())))
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory control group of ``limit`` bytes without swap; the file that takes its members."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"gainlens-{os.getpid()}"
    group.mkdir()
    try:
        if old.is_dir():
            (group / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def forget_cache(folder: Path) -> None:
    """Take files out of the page cache: pages that are there already count for no group."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Every stage, with its seconds and its peak."""
    stages: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"stages": stages}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        reset_peak()
        started, used = time.monotonic(), time.process_time()
        found = do()
        stages.append(
            {
                "stage": name,
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - used, 1),
                "peak_gb": peak_gb(),
            }
        )
        print(stages[-1], flush=True)
        (folder / STAGES).write_text(json.dumps(facts))
        return found

    model = timed("load", lambda: gl.load_model(folder / MODEL, device_map="disk"))
    facts["n_weights"] = sum(p.numel() for p in model.original_model.parameters())
    facts["weights_gb"] = size_gb(folder / MODEL)
    tokens = text(args.documents, args.length)
    timed("find the keys", lambda: gl.model.key_sites(model))
    gains = timed("probe", lambda: gl.probe_gains(model, tokens, progress=False))
    mask = timed("rank and cut", lambda: gl.KeyMask.quietest(gains, FRACTION, "qk"))
    thin = timed("slim", lambda: gl.slim(model, mask))
    facts["slim_difference"] = thin.gainlens_parity.difference
    timed("write the slim folder", lambda: write_slim(thin, folder / SLIM))
    facts["slim_gb"] = size_gb(folder / SLIM)
    if args.refit:
        shutil.rmtree(folder / SLIM)
        cut = timed("refit", lambda: gl.refit(model, tokens, mask, rounds=1, progress=False))
        thin = timed("slim the refit", lambda: gl.slim(model, cut))
        timed("write the refitted folder", lambda: write_slim(thin, folder / SLIM))
    (folder / STAGES).write_text(json.dumps(facts))


def compare(folder: Path) -> dict[str, Any]:
    """A small model from disk and in memory: gains, fitted maps and files."""
    write_model(folder / MODEL, argparse.Namespace(**SMALL))
    tokens = text(2, 32)
    found = []
    for place in (None, "disk"):
        model = gl.load_model(folder / MODEL, device_map=place)
        gains = gl.probe_gains(model, tokens, scores=("qk", "fisher"), progress=False)
        mask = gl.KeyMask.quietest(gains, FRACTION, "qk")
        cut = gl.refit(model, tokens, mask, rounds=1, iterations=2, ridge=0.1, progress=False)
        write_slim(gl.slim(model, cut), folder / f"{SLIM}-{place}")
        found.append((gains, mask, cut))
    (gains, mask, cut), (other, other_mask, other_cut) = found
    here, there = (folder / f"{SLIM}-{p}" / "model.safetensors" for p in (None, "disk"))
    return {
        **SMALL,
        "largest_difference_of_gains": max(
            float((gains.score(s) - other.score(s)).abs().max()) for s in ("qk", "fisher")
        ),
        "same_mask": torch.equal(mask.keep, other_mask.keep),
        "largest_difference_of_maps": float((cut.key_maps - other_cut.key_maps).abs().max()),
        "same_bytes_of_slim_weights": here.read_bytes() == there.read_bytes(),
    }


def write_slim(thin: Any, folder: Path) -> None:
    """For gainlens, in the type in which the original is stored."""
    gl.export_model(thin, folder, precision="bf16")


def text(documents: int, length: int) -> torch.Tensor:
    """Random tokens: the model knows no words."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (documents, length), generator=generator)


def size_gb(folder: Path) -> float:
    """Size of the weights in a folder."""
    return round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30, 2)


def reset_peak() -> None:
    """Start a new peak of the resident memory of this process (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """The largest resident memory since ``reset_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 2**20, 2)
    return 0.0


if __name__ == "__main__":
    main()
