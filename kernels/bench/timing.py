"""Timing that knows when something else had the processor, and the machine's two ceilings."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gainlens_kernels import cpu


def _waited() -> int:
    """Nanoseconds that this process's threads spent ready but without a processor (Linux)."""
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            total += int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return total


def sample_cpu(call: Callable[[], Any]) -> tuple[float, bool]:
    """Seconds of one call, and whether other processes took part of it."""
    before = _waited()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, (_waited() - before) * 1e-9 > 0.03 * seconds + 5e-6


def sample_cuda(call: Callable[[], Any]) -> tuple[float, bool]:
    """Seconds of one call by CUDA events, with a cold second-level cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_l2()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3, False


_FLUSH: list[torch.Tensor] = []


def _flush_l2() -> None:
    # A gigabyte: long enough for Python to have queued the call before the GPU is done with it,
    # so that the events stand right before and behind the kernels.
    if not _FLUSH:
        _FLUSH.append(torch.empty(1 << 30, dtype=torch.int8, device="cuda"))
    _FLUSH[0].zero_()


def measure(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float = 1.2
) -> dict[str, dict[str, Any]]:
    """Median, least and number of undisturbed samples per call, in turns.

    Taking turns lets whatever changes on the machine hit all alike; the order is drawn anew each
    turn, since who follows the readers of the ceiling finds a cold cache. A call that fails is
    reported with its error; one far slower than the fastest is timed once or twice.
    """
    sample = sample_cuda if device == "cuda" else sample_cpu
    first: dict[str, float] = {}
    out: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            call()
            first[name] = sample(call)[0]
        except Exception as error:
            out[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:160]}
    reference = first.get("ours", min(first.values(), default=0.0))
    fast = {n: t for n, t in first.items() if t < 20 * reference or "ceiling" in n}
    rounds = max(5, min(60, int(seconds / max(1e-6, sum(fast.values())))))
    taken: dict[str, list[tuple[float, bool]]] = {name: [] for name in first}
    order, draw = list(first), random.Random(0)
    for turn in range(rounds):
        draw.shuffle(order)
        for name in order:
            if name in fast or (turn < 2 and first[name] < 1.0) or turn == 0:
                if first[name] < 2e-3 and device == "cpu":
                    calls[name]()  # what fits the cache is timed there, whoever came before
                    calls[name]()
                taken[name].append(sample(calls[name]))
    for name, samples in taken.items():
        clean = [t for t, disturbed in samples if not disturbed]
        used = clean if len(clean) >= 3 or len(clean) == len(samples) else [t for t, _ in samples]
        out[name] = {
            "median_us": statistics.median(used) * 1e6,
            "min_us": min(used) * 1e6,
            "samples": len(used),
            "disturbed": len(samples) - len(clean),
        }
    return out


def read_bandwidth(device: str) -> float:
    """Bytes per second, the best of several readers of half a gigabyte (GPU: of a copy)."""
    if device == "cuda":
        a = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
        b = torch.empty_like(a)
        times = [sample_cuda(lambda: b.copy_(a))[0] for _ in range(20)]
        return 2 * a.numel() / statistics.median(times)
    data = torch.ones(128 << 20)
    threads = torch.get_num_threads()
    readers: list[Callable[[], Any]] = [data.sum]
    if cpu.native is not None:
        native = cpu.native
        for ahead in (0, 512, 2048, 4096):
            readers.append(
                lambda ahead=ahead: native.read_floats(
                    data.data_ptr(), data.numel() - 4096, ahead, threads
                )
            )
    best = 0.0
    for reader in readers:
        reader()
        samples = [sample_cpu(reader) for _ in range(9)]
        times = [t for t, disturbed in samples if not disturbed] or [t for t, _ in samples]
        best = max(best, data.numel() * 4 / statistics.median(times))
    return best


def products(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The matrix products that PyTorch brings: on some processors MKL's is not the fast one."""
    found: dict[str, Callable[[], Any]] = {"product": lambda: a @ b}
    library = torch.ops.mkldnn
    if a.device.type != "cpu" or not hasattr(library, "_linear_pointwise"):
        return found
    turned = b.T.contiguous()
    weights = {"product by oneDNN": turned}
    try:
        weights["product by oneDNN, packed"] = library._reorder_linear_weight(turned, len(a))
        for name, weight in weights.items():
            found[name] = lambda weight=weight: library._linear_pointwise(
                a, weight, None, "none", [], ""
            )
            found[name]()
    except (AttributeError, RuntimeError):  # a release or processor without it
        return {"product": found["product"]}
    return found


READ_FLOATS = 64 << 20
_CEILING: list[torch.Tensor] = []


def ceiling_calls() -> dict[str, Callable[[], Any]]:
    """Readers of 256 MB and matrix products of 1024, to be timed in turns with a row."""
    if not _CEILING:
        _CEILING.extend((torch.ones(READ_FLOATS), torch.randn(1024, 1024)))
    data, square = _CEILING
    calls: dict[str, Callable[[], Any]] = {
        "ceiling: read by sum": data.sum,
        **{f"ceiling: {name}": call for name, call in products(square, square).items()},
    }
    if cpu.native is not None:
        native, threads = cpu.native, torch.get_num_threads()
        for ahead in (0, 4096):
            calls[f"ceiling: read, {ahead} ahead"] = lambda ahead=ahead: native.read_floats(
                data.data_ptr(), READ_FLOATS - 4096, ahead, threads
            )
    return calls


def matmul_rate(device: str) -> float:
    """FLOP per second of the best square matrix product (float32; GPU: bfloat16)."""
    sample = sample_cuda if device == "cuda" else sample_cpu
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    best = 0.0
    for n in (4096, 8192) if device == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for call in products(a, b).values():
            call()
            samples = [sample(call) for _ in range(15)]
            times = [t for t, disturbed in samples if not disturbed] or [t for t, _ in samples]
            best = max(best, 2 * n**3 / statistics.median(times))
    return best


def call_cost() -> dict[str, float]:
    """Microseconds of one query against 16 keys at 32/64, ours and scaled_dot_product_attention."""
    import torch.nn.functional as F
    from gainlens_kernels import sliced_attention

    q, k, v = torch.randn(1, 9, 1, 32), torch.randn(1, 3, 16, 32), torch.randn(1, 3, 16, 64)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: sliced_attention(q, k, v, scale=0.1),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, scale=0.1, enable_gqa=True),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2000):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}
