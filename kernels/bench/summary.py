"""What the ledger says about the numbers that were asked, and the ledger as a table."""

from __future__ import annotations

import math
from typing import Any


def geometric(values: list[float]) -> float | None:
    """Geometric mean, None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _timed(row: dict[str, Any], *prefixes: str) -> list[float]:
    return [
        x["median_us"]
        for name, x in row["rivals"].items()
        if name.startswith(prefixes) and "median_us" in x
    ]


def same_work(row: dict[str, Any]) -> list[float]:
    """Times of the rivals that compute this very row (equal widths: the full ones do)."""
    prefixes = ["thin", "padded"] + (["full"] if row["d_qk"] == row["d_v"] else [])
    return _timed(row, *prefixes)


def summarise(rows: list[dict[str, Any]], cache_bytes: int) -> dict[str, Any]:
    """Figures of the acceptance list; None where no row of the kind was run."""
    decode = [r for r in rows if r["kind"] == "decode"]
    prefill = [r for r in rows if r["kind"] == "prefill"]
    beyond = [r for r in decode if r["bytes"] > cache_bytes]
    thin = [r for r in beyond if r["d_qk"] < r["d_v"]]

    def widths(rows: list[dict[str, Any]], *pairs: tuple[int, int]) -> list[dict[str, Any]]:
        return [r for r in rows if (r["d_qk"], r["d_v"]) in pairs]

    worst = sorted(
        ((r["ours"]["median_us"] / min(same_work(r)), r["name"]) for r in rows if same_work(r)),
        reverse=True,
    )
    return {
        "decode beyond the cache: share of read bandwidth": geometric(
            [r["share_of_bandwidth"] for r in beyond]
        ),
        "the same, least": min((r["share_of_bandwidth"] for r in beyond), default=None),
        "decode, thin: best rival / ours": geometric(
            [min(same_work(r)) / r["ours"]["median_us"] for r in decode if r["d_qk"] < r["d_v"]]
        ),
        "decode, thin, beyond the cache: best rival / ours": geometric(
            [min(same_work(r)) / r["ours"]["median_us"] for r in thin]
        ),
        "decode at 32/64: full-width sdpa (best) / ours": geometric(
            [min(_timed(r, "full")) / r["ours"]["median_us"] for r in widths(decode, (32, 64))]
        ),
        "decode at 32/64: full-width sdpa (enable_gqa) / ours": geometric(
            [
                r["rivals"]["full: enable_gqa"]["median_us"] / r["ours"]["median_us"]
                for r in widths(decode, (32, 64))
            ]
        ),
        "prefill at 64/64 and 128/128: share of matrix-product rate": geometric(
            [r["share_of_matmul"] for r in widths(prefill, (64, 64), (128, 128))]
        ),
        "prefill at 32/64 and 64/128: ours / padded flash": geometric(
            [
                r["ours"]["median_us"] / r["rivals"]["padded: flash"]["median_us"]
                for r in widths(prefill, (32, 64), (64, 128))
                if "median_us" in r["rivals"]["padded: flash"]
            ]
        ),
        "largest ours / best rival": worst[0][0] if worst else None,
        "rows slower than the best rival by more than 5%": [
            f"{name}: {ratio:.2f}" for ratio, name in worst if ratio > 1.05
        ],
        "rows": len(rows),
    }


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value in ([], None) else str(value)


def markdown(ledger: dict[str, Any]) -> str:
    """The ledger as a page."""
    m = ledger["machine"]
    lines = [
        f"# Sliced attention on {m['name']}",
        "",
        f"{m['threads']} threads, {m['dtype']}, PyTorch {m['torch']}, kernels: {m['backend']}. "
        f"Last run {ledger['date']}.",
        "Times are medians in microseconds, taken in turns with the rivals of the row; shares "
        "are of the ceilings measured in the same run. The best rival is the fastest other way "
        "to compute the same row (keys thin, or stored padded); *full* is the fastest "
        "scaled_dot_product_attention with queries and keys as wide as the values.",
        "",
        "| figure | value |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {_number(value)} |" for name, value in ledger["summary"].items()]
    lines += [
        "",
        "| row | ours | GB/s | GFLOP/s | share | best rival | ours / best | full / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in ledger["rows"]:
        ours = r["ours"]["median_us"]
        named = {n: x["median_us"] for n, x in r["rivals"].items() if "median_us" in x}
        equal = r["d_qk"] == r["d_v"]
        same = {n: t for n, t in named.items() if equal or not n.startswith("full")}
        best = min(same, key=lambda n: same[n]) if same else "none"
        full = min((t for n, t in named.items() if n.startswith("full")), default=math.nan)
        share = r["share_of_bandwidth"] if r["kind"] == "decode" else r["share_of_matmul"]
        ratio = f"{ours / same[best]:.2f}" if same else ""
        lines.append(
            f"| {r['name']} | {ours:.0f} | {r['bytes'] / ours / 1e3:.1f} | "
            f"{r['flops'] / ours / 1e3:.0f} | {share:.0%} | {best} | {ratio} | {full / ours:.2f} |"
        )
    lines += [f"| {name} | not run: {why} | | | | | | |" for name, why in ledger["skipped"].items()]
    return "\n".join(lines) + "\n"
