"""What the ledger says about the numbers that were asked, and the ledger as a table.

``python kernels/bench/summary.py docs/results/kernels_cpu.json`` writes the page of a recorded
ledger anew and measures nothing.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def geometric(values: list[float]) -> float | None:
    """Geometric mean, None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _timed(row: dict[str, Any], *prefixes: str) -> dict[str, float]:
    return {
        name: x["median_us"]
        for name, x in row["rivals"].items()
        if name.startswith(prefixes) and "median_us" in x
    }


def same_work(row: dict[str, Any]) -> dict[str, float]:
    """Times of the rivals that compute this very row (equal widths: the full ones do)."""
    prefixes = ["thin", "padded"] + (["full"] if row["d_qk"] == row["d_v"] else [])
    return _timed(row, *prefixes)


def _over_ours(rows: list[dict[str, Any]], *prefixes: str) -> float | None:
    """Mean of the fastest rival of these names over ours, in the rows where one ran."""
    pairs = [(_timed(r, *prefixes).values(), r["ours"]["median_us"]) for r in rows]
    return geometric([min(times) / ours for times, ours in pairs if times])


def summarise(rows: list[dict[str, Any]], cache_bytes: int) -> dict[str, Any]:
    """Figures of the acceptance list; None where no row of the kind was run."""
    decode = [r for r in rows if r["kind"] == "decode"]
    prefill = [r for r in rows if r["kind"] == "prefill"]
    beyond = [r for r in decode if r["bytes"] > cache_bytes]

    def widths(rows: list[dict[str, Any]], *pairs: tuple[int, int]) -> list[dict[str, Any]]:
        return [r for r in rows if (r["d_qk"], r["d_v"]) in pairs]

    def thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in rows if r["d_qk"] < r["d_v"]]

    worst = sorted(
        (
            (r["ours"]["median_us"] / min(same_work(r).values()), r["name"])
            for r in rows
            if same_work(r)
        ),
        reverse=True,
    )
    padded = _over_ours(widths(prefill, (32, 64), (64, 128)), "padded: flash")
    figures = {
        "decode beyond the cache: share of read bandwidth": geometric(
            [r["share_of_bandwidth"] for r in beyond]
        ),
        "the same, least": min((r["share_of_bandwidth"] for r in beyond), default=None),
        "decode, thin: best rival / ours": _over_ours(thin(decode), "thin", "padded"),
        "decode, thin, beyond the cache: best rival / ours": _over_ours(
            thin(beyond), "thin", "padded"
        ),
        "decode at 32/64: full-width sdpa (best) / ours": _over_ours(
            widths(decode, (32, 64)), "full"
        ),
        "decode at 32/64: full-width sdpa (enable_gqa) / ours": _over_ours(
            widths(decode, (32, 64)), "full: enable_gqa"
        ),
        "prefill at 64/64 and 128/128: share of matrix-product rate": geometric(
            [r["share_of_matmul"] for r in widths(prefill, (64, 64), (128, 128))]
        ),
        "prefill at 32/64 and 64/128: ours / padded flash": padded and 1 / padded,
        "largest ours / best rival": worst[0][0] if worst else None,
        "rows slower than the best rival by more than 5%": [
            f"{name}: {ratio:.2f}" for ratio, name in worst if ratio > 1.05
        ],
        "rows": len(rows),
    }
    return figures | _on_a_gpu(widths(prefill, (32, 64), (64, 128), (32, 128)))


def _on_a_gpu(prefill: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures that only rows with a ceiling of exponentials have."""
    rows = [r for r in prefill if "share_of_tighter" in r]
    if not rows:
        return {}
    at = "prefill at 32/64, 64/128, 32/128: "
    return {
        at + "padded flash / ours": _over_ours(rows, "padded: flash"),
        at + "padded cudnn / ours": _over_ours(rows, "padded: cudnn"),
        at + "flex / ours": _over_ours(rows, "thin: flex"),
        at + "share of the tighter of tensor cores and exponentials": geometric(
            [r["share_of_tighter"] for r in rows]
        ),
    }


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value in ([], None) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]] + [""]


def _row(r: dict[str, Any]) -> list[str]:
    ours, same = r["ours"]["median_us"], same_work(r)
    best = min(same, key=lambda n: same[n], default="none")
    full = min(_timed(r, "full").values(), default=math.nan)
    share = r["share_of_bandwidth"] if r["kind"] == "decode" else r["share_of_matmul"]
    share = r.get("share_of_tighter", share) if r["kind"] == "prefill" else share
    return [
        r["name"],
        f"{ours:.0f}",
        f"{r['bytes'] / 1e6:.3g}",
        f"{r['flops'] / 1e9:.3g}",
        f"{r['bytes'] / ours / 1e3:.1f}",
        f"{r['flops'] / ours / 1e3:.0f}",
        f"{share:.0%}",
        best,
        f"{ours / same[best]:.2f}" if same else "",
        f"{full / ours:.2f}",
    ]


def markdown(ledger: dict[str, Any]) -> str:
    """The ledger as a page."""
    m = ledger["machine"]
    rows = ledger["rows"]
    gpu = any("share_of_tighter" in r for r in rows)
    compute = "the tighter of tensor cores and exponentials" if gpu else "the matrix-product rate"
    lines = [
        f"# Sliced attention on {m['name']}",
        "",
        f"{m['threads']} threads, {m['dtype']}, PyTorch {m['torch']}, kernels: {m['backend']}. "
        f"Last run {ledger['date']}.",
        "Times are medians in microseconds, taken in turns with the rivals of the row; shares "
        "are of the ceilings measured in the same run: of the read bandwidth in decode, of "
        f"{compute} in prefill. The best rival is the fastest other way "
        "to compute the same row (keys thin, or stored padded); *full* is the fastest "
        "scaled_dot_product_attention with queries and keys as wide as the values.",
        "",
    ]
    summary = [[name, _number(value)] for name, value in ledger["summary"].items()]
    lines += _table(["figure", "value"], summary)
    head = ["row", "ours", "MB", "GFLOP", "GB/s", "GFLOP/s", "share", "best rival"]
    table = [_row(r) for r in rows]
    for name, why in ledger["skipped"].items():
        table.append([name, f"not run: {why}", *[""] * 8])
    lines += _table([*head, "ours / best", "full / ours"], table)
    names = list(dict.fromkeys(n for r in rows for n in r["rivals"]))
    lines += [
        "## Every rival",
        "",
        "Its time over ours: above 1 ours is faster. Empty where it does not apply or was not "
        "run, *error* where it failed.",
        "",
    ]
    every = []
    for r in rows:
        times = {n: f"{t / r['ours']['median_us']:.2f}" for n, t in _timed(r, "").items()}
        every.append(
            [r["name"], *(times.get(n, "error" if n in r["rivals"] else "") for n in names)]
        )
    lines += _table(["row", *names], every)
    return "\n".join(lines)


def main() -> int:
    """Write the pages of the ledgers named on the command line."""
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
