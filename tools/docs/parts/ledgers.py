"""The pages on kernels, engines and the cost of measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts.markdown import (
    RESULTS,
    ROOT,
    details,
    not_yet,
    number,
    provenance,
    recorded,
    table,
)

MANY = 16
"""A list of more rows than this opens on a click."""


def kernels() -> str:
    """Every recorded machine: its summary, then all rows."""
    files = sorted(RESULTS.glob("kernels_*.json"))
    if not files:
        return not_yet("the kernel times", "make bench-kernels")
    return "\n\n".join(_kernels(path) for path in files)


def _kernels(path: Path) -> str:
    facts = recorded(path)
    assert facts is not None
    machine = facts["machine"]
    parts = [
        f"## {machine.get('name', path.stem)}",
        ", ".join(f"{k} {v}" for k, v in machine.items() if k != "name" and _plain(v))
        + (f", {facts['date']}" if facts.get("date") else "")
        + ".",
    ]
    if summary := facts.get("summary"):
        rows = [(k, "none" if v == [] else v) for k, v in summary.items() if _plain(v) or v == []]
        parts.append(table(["figure", "value"], rows))
    rows = [_kernel_row(row) for row in facts.get("rows", ())]
    if rows:
        head = [
            "case",
            "ours (µs)",
            "best alternative (µs)",
            "alternative / ours",
            "share of read bandwidth",
        ]
        parts.append(details(f"All {len(rows)} cases", table(head, rows)))
    for name, why in (facts.get("skipped") or {}).items():
        parts.append(f"Skipped: {name}, {why}.")
    return "\n\n".join(parts)


def _kernel_row(row: dict[str, Any]) -> tuple[Any, ...]:
    ours = row["ours"]["median_us"]
    rivals = {n: r["median_us"] for n, r in row.get("rivals", {}).items() if "median_us" in r}
    # As in the ledger's own summary: ways that compute the same thin row, or the row itself
    # where it is not thin; a full-width row is another computation.
    same = {n: t for n, t in rivals.items() if not n.startswith("full") or not _thin(row)}
    best = min(same, key=same.__getitem__, default=None)
    share = row.get("share_of_bandwidth")
    return (
        str(row["name"]),
        float(ours),
        f"{number(float(same[best]))} ({best})" if best else "–",
        f"{same[best] / ours:.2f}" if best else "–",
        f"{share:.0%}" if isinstance(share, float) and row.get("kind") == "decode" else "–",
    )


def _thin(row: dict[str, Any]) -> bool:
    return bool(row.get("d_qk") != row.get("d_v"))


def engines() -> str:
    """The same slim checkpoint in three engines."""
    facts = recorded(RESULTS / "engines.json")
    if facts is None:
        return not_yet("docs/results/engines.json", "make engines")
    rows, times = [], []
    for name, found in facts["engines"].items():
        rows.append(
            (
                name,
                str(found["version"]),
                found["prompts"],
                found["logprobs_compared"],
                f"{found['largest_logprob_difference']:.1e}",
                len(found["different_rows"]),
            )
        )
        for row in found["decode"]:
            times.append(
                (name, row["context"], row["full_ms"], row["slim_ms"],
                 f"× {row['measured_ratio']:.2f}", f"× {row['predicted_ratio']:.2f}")
            )  # fmt: skip
    text = facts["text"]
    return "\n\n".join(
        [
            f"{facts['model']} with {facts['plan']['keys']:.0%} of its keys and values, one set "
            f"for all heads. {text['prompts']} prompts of {text['length']} tokens ({text['name']}, "
            f"{text['split']}), {facts['new_tokens']} new tokens each. Reference: "
            f"{facts['reference']}. Target: log-probabilities within "
            f"{facts['targets']['logprob']:g} and {facts['targets']['greedy']}.",
            table(
                ["engine", "version", "prompts", "log-probabilities compared",
                 "largest difference", "prompts whose greedy tokens differ"],
                rows,
            ),
            table(
                ["engine", "context", "full (ms per token)", "slim (ms per token)", "speed-up",
                 "predicted from bytes"],
                times,
            ),
            "Times are for one more token. Full and slim models take turns; the median is given. "
            "llama.cpp runs with its defaults (float16 cache, fused attention). The prediction "
            "counts only the bytes that are read. Where an engine spends more time on other work "
            "per token, thin heads save less.",
            *_full_values(facts),
            provenance(facts, "docs/results/engines.json"),
        ]
    )  # fmt: skip


def _full_values(facts: dict[str, Any]) -> list[str]:
    """Thin keys with untouched values in llama.cpp, beside the intact model's own spread."""
    found = facts.get("full_values")
    if not found:
        return []
    rows = [
        (
            row["checkpoint"], row["cache"], f"{row['cache_share']:.4g}", row["prompts"],
            f"{row['largest_logprob_difference']:.1e}", len(row["different_rows"]),
        )
        for row in found
    ]  # fmt: skip
    head = ["checkpoint", "cache", "share of the intact cache", "prompts", "largest difference",
            "prompts whose greedy tokens differ"]  # fmt: skip
    return [
        "Thin keys with untouched values in llama.cpp, the healed checkpoints of the "
        "[worth ledger](ledger_worth.md), each against transformers in float32 on the same "
        f"prompts:\n\n{table(head, rows)}",
        "Weights are in float32. A cache in f16 rounds, so it is to be read beside the intact "
        "model's.",
    ]


def cost() -> str:
    """What probing and cutting cost beside the plain forward pass."""
    commands = {
        "probe.json": "python benchmarks/probe.py",
        "surgery_speed.json": "python benchmarks/surgery_speed.py",
        "coordinate_map_scale.json": "python benchmarks/coordinate_map.py --scale",
    }
    titles = ("Probing", "Surgery", "The map")
    parts = []
    for title, (file, command) in zip(titles, commands.items(), strict=True):
        facts = recorded(RESULTS / file)
        parts.append(f"## {title}")
        parts.append(not_yet(file, command) if facts is None else anything(facts, RESULTS / file))
    return "\n\n".join(parts)


def anything(facts: Any, path: Path) -> str:
    """A recorded run of any format: its scalars, then each list of rows as a table."""
    parts = []
    if isinstance(facts.get("what"), str):
        what = facts["what"]
        # A name of the code keeps its small letter.
        parts.append((what if "." in what.split()[0] else what[:1].upper() + what[1:]) + ".")
    known = {"what", "versions", "machine", "seed", "command"}
    scalars, tables = _flatten({k: v for k, v in facts.items() if k not in known})
    if scalars:
        parts.append(table(["figure", "value"], scalars))
    for name, rows in tables:
        head = list(dict.fromkeys(key for row in rows for key in row))
        made = table(head, [[row.get(key) for key in head] for row in rows])
        title = name.replace("_", " ")
        parts.append(f"**{title}**")
        parts.append(made if len(rows) <= MANY else details(f"{len(rows)} rows", made))
    if facts.get("command"):
        parts.append(f"Command: `{facts['command']}`.")
    parts.append(provenance(facts, path.relative_to(ROOT).as_posix()))
    return "\n\n".join(parts)


def _flatten(
    value: dict[str, Any], prefix: str = ""
) -> tuple[list[tuple[str, Any]], list[tuple[str, list[dict[str, Any]]]]]:
    """Scalars by dotted path, and lists of flat rows by theirs; long bare lists are left out."""
    scalars: list[tuple[str, Any]] = []
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if _plain(inner):
            if not (isinstance(inner, str) and len(inner) == 64):  # a hash tells a reader nothing
                scalars.append((name.replace("_", " "), inner))
        elif isinstance(inner, dict):
            more, deeper = _flatten(inner, f"{name}: ")
            scalars += more
            tables += deeper
        elif inner and isinstance(inner, list) and all(isinstance(row, dict) for row in inner):
            tables.append((name, [dict(_flatten(row)[0]) for row in inner]))
        elif isinstance(inner, list) and 0 < len(inner) <= 4 and all(map(_plain, inner)):
            scalars.append((name.replace("_", " "), ", ".join(number(v) for v in inner)))
    return scalars, tables


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
