"""Measure the table and write the ledger: ``python kernels/bench/run.py [--quick]``.

Writes ``docs/results/kernels_<device>.json`` and the table beside it. Rows already in a ledger
of the same machine and versions are kept, so that a run cut short by ``--minutes`` goes on where
it stopped; ``--fresh`` starts over. On a CPU the ceilings are measured again in
each row, in turns with it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gainlens_kernels import backend, sliced_attention
from rivals import rivals, tensors
from shapes import Shape, cpu_table, gpu_table
from summary import markdown, summarise
from timing import (
    READ_FLOATS,
    call_cost,
    ceiling_calls,
    matmul_rate,
    measure,
    read_bandwidth,
    sample_cuda,
)
from tqdm import tqdm

FLEX_WIDTHS = ((64, 64), (32, 64), (64, 128))


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend(device),
    }


def cache_bytes(device: str) -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().rstrip("K")) << 10 for p in sizes), default=32 << 20)


def measured_ceilings(device: str) -> dict[str, float]:
    """Bytes, operations and (on a GPU) exponentials per second that the machine reaches."""
    found = {"read_bandwidth": read_bandwidth(device), "matmul_rate": matmul_rate(device)}
    if device == "cuda":
        from exponentials import exponential_rate

        found["exponential_rate"] = exponential_rate(sample_cuda)
    return found


def room_gb(device: str) -> float:
    """What a row with its rivals may take by default: half of a GPU's memory, 5 GB elsewhere."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2e9
    return 5.0


def needed_gb(shape: Shape, device: str) -> float:
    """Keys and values of a row: thin, at full width and padded."""
    wide = 2 * shape.d_v + shape.d_qk + (shape.d_v if shape.d_qk < shape.d_v else 0)
    element = 2 if device == "cuda" else 4
    return shape.batch * shape.kv_heads * shape.keys * wide * element / 1e9


def wants_flex(shape: Shape, choice: str) -> bool:
    """FlexAttention is compiled per shape, half a minute each on a CPU: there a few shapes only."""
    if choice != "some":
        return choice == "all"
    few = (shape.heads, shape.kv_heads) == (32, 8) and shape.keys in (1024, 8192)
    return few and shape.batch == 1 and (shape.d_qk, shape.d_v) in FLEX_WIDTHS


def run_row(
    shape: Shape, device: str, ceilings: dict[str, float], flex: str, repeat: bool
) -> dict[str, Any]:
    """Time one shape, ours and every rival, in turns."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    data = tensors(shape, dtype, device)
    scale = shape.d_v**-0.5
    q, k, v = data[:3]
    calls: dict[str, Any] = {"ours": lambda: sliced_attention(q, k, v, scale=scale)}
    calls.update(rivals(shape, data, scale, wants_flex(shape, flex), repeat))
    if device == "cpu":
        # In turns with the row: a virtual machine's bandwidth changes within minutes.
        calls.update(ceiling_calls())
    times = measure(calls, device)
    ours = times.pop("ours")
    readers = [times.pop(n)["median_us"] for n in list(times) if n.startswith("ceiling: read")]
    if readers:
        found = [times.pop(n)["median_us"] for n in list(times) if n.startswith("ceiling: product")]
        product = min(found)
        ceilings = {
            "read_bandwidth": READ_FLOATS * 4 / (min(readers) * 1e-6),
            "matmul_rate": 2 * 1024**3 / (product * 1e-6),
        }
    moved, flops = shape.bytes(q.element_size()), shape.flops()
    seconds = ours["median_us"] * 1e-6
    row = {
        "name": shape.name,
        **vars(shape),
        "bytes": moved,
        "flops": flops,
        "ours": ours,
        "rivals": times,
        "share_of_bandwidth": moved / seconds / ceilings["read_bandwidth"],
        "share_of_matmul": flops / seconds / ceilings["matmul_rate"],
        "ceilings": ceilings,
    }
    if "exponential_rate" in ceilings:
        row["exponentials"] = shape.pairs()
        row["share_of_exponentials"] = row["exponentials"] / seconds / ceilings["exponential_rate"]
        row["share_of_tighter"] = max(row["share_of_matmul"], row["share_of_exponentials"])
    return row


def write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def save(ledger: dict[str, Any], done: dict[str, Any], table: list[Shape], path: Path) -> None:
    """Write the ledger and its page from the rows so far."""
    order = {s.name: i for i, s in enumerate(table)}
    ledger["rows"] = sorted(done.values(), key=lambda row: order.get(row["name"], 1 << 30))
    ledger["date"] = datetime.date.today().isoformat()
    ledger["summary"] = summarise(ledger["rows"], ledger["cache_bytes"])
    if "call_cost_us" in ledger:
        cost = ledger["call_cost_us"]
        ledger["summary"]["one query, 16 keys: ours / sdpa"] = cost["ours"] / cost["sdpa"]
    write(path, json.dumps(ledger, indent=1) + "\n")
    write(path.with_suffix(".md"), markdown(ledger))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="heads 32/8, four pairs of widths")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after about this long")
    parser.add_argument(
        "--max-gb", type=float, help="skip rows that need more memory (5, or half of a GPU's)"
    )
    parser.add_argument("--flex", choices=("all", "some", "none"), help="all on a GPU, else some")
    parser.add_argument("--fresh", action="store_true", help="forget rows measured before")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    started = time.monotonic()

    device = options.device
    room = options.max_gb or room_gb(device)
    flex = options.flex or ("all" if device == "cuda" else "some")
    path = options.out / f"kernels_{device}.json"
    here = machine(device)
    ledger: dict[str, Any] = {"machine": here, "rows": [], "skipped": {}}
    if path.exists() and not options.fresh:
        before = json.loads(path.read_text())
        if before.get("machine") == here:
            ledger = before
    done = {row["name"]: row for row in ledger["rows"]}

    table = gpu_table() if device == "cuda" else cpu_table()
    wanted = [s for s in table if options.only in s.name]
    if options.quick:
        widths = ((64, 64), (32, 64), (12, 64), (64, 128))
        wanted = [s for s in wanted if s.kv_heads == 8 and (s.d_qk, s.d_v) in widths]
    ceilings = measured_ceilings(device)
    ledger["ceilings"], ledger["cache_bytes"] = ceilings, cache_bytes(device)
    if device == "cpu":
        ledger["call_cost_us"] = call_cost()
    for shape in tqdm([s for s in wanted if s.name not in done], file=sys.stderr, mininterval=5):
        if time.monotonic() - started > options.minutes * 60:
            break
        need = needed_gb(shape, device)
        if need > room:
            ledger["skipped"][shape.name] = f"needs {need:.0f} GB with its rivals"
            continue
        ledger["skipped"].pop(shape.name, None)
        repeat = need * shape.heads / shape.kv_heads <= room
        done[shape.name] = run_row(shape, device, ceilings, flex, repeat)
        save(ledger, done, table, path)
        gc.collect()
        torch.compiler.reset()
    save(ledger, done, table, path)
    print(f"read bandwidth {ceilings['read_bandwidth'] / 1e9:.1f} GB/s, ", end="")
    print(f"matrix product {ceilings['matmul_rate'] / 1e9:.0f} GFLOP/s")
    for name, value in ledger["summary"].items():
        print(f"{name}: {value}")
    print(f"{path.with_suffix('.md')}: {len(done)} of {len(table)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
