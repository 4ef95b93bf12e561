"""The worth ledger: loss and speed of the same checkpoints, from ``benchmarks/worth.py``."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, interval, not_yet, provenance, recorded, table

FILE = RESULTS / "worth.json"
INTACT = "intact"
ROUNDED = {"q8_0": "with its cache in q8_0", "bf16": "in bf16"}
"""Caches that round, and how a sentence says it."""
FILL = {"bf16": "left", "q8_0": "none"}
"""Of a marker in the figure; those of whole precision (f32, in llama.cpp f16) are full."""
CONTEXTS = {"256": "256 tokens", "2048": "2,048 tokens", "8192": "8,192 tokens"}


def facts() -> dict[str, Any]:
    """The record; empty where there is none."""
    return recorded(FILE) or {}


def page() -> str:
    """Losses, speeds, what was not run."""
    found = facts()
    if not found:
        return not_yet("what the checkpoints cost and how fast they are", "make worth")
    parts = [answer(found)]
    if found["losses"]:
        parts += [losses(found)]
    parts.append(tasks(found))
    if found["speed"]:
        parts += [speeds(found), doubling(found), in_float32(found), limits(found)]
    parts.append(provenance(found, "docs/results/worth.json"))
    return "\n\n".join(part for part in parts if part)


def short() -> str:
    """The answer alone, for the README."""
    found = facts()
    return (
        answer(found) if found else not_yet("loss and speed of the same checkpoints", "make worth")
    )


def worst(found: dict[str, Any], checkpoint: str, cache: str) -> dict[str, Any] | None:
    """The verdict at the worst context that was judged, by its worst text; None without one."""
    if checkpoint == INTACT and cache in ("f32", "f16"):
        return {"estimate": 0.0, "status": "is the baseline"}
    rows = ((found["losses"] or {}).get("rows") or {}).get(checkpoint, {})
    judged = rows.get("f32" if cache == "f16" else cache)
    if not judged:
        return None
    judged = {**rows.get("f32", {}), **judged}  # where q8_0 was not judged, it costs no less
    verdicts = [one["verdict"] for one in judged.values()]
    return max(verdicts, key=lambda v: v["estimate"])


def _of_the_run(row: dict[str, Any]) -> dict[str, Any] | None:
    """The worst text of the healing run that the checkpoint is of; nothing for a rounded cache."""
    run = recorded(RESULTS / f"slots_{row['checkpoint']}.json")
    if run is None or run["healed"] is None or row["cache"] in ROUNDED:
        return None
    found: dict[str, Any] = max(run["healed"]["verdicts"].values(), key=lambda v: v["estimate"])
    return found


def baselines(found: dict[str, Any], engine: str) -> dict[tuple[int, int], float]:
    """Tokens per second of the intact model by context and batch: its best form in the engine."""
    best: dict[tuple[int, int], float] = {}
    for row in found["speed"]["rows"]:
        # gainlens' engine and transformers run in one process: the best form of either counts.
        same = (row["engine"] == "llama.cpp") == (engine == "llama.cpp")
        if row["checkpoint"] == INTACT and same and row["cache"] != "q8_0":
            at = (row["context"], row["batch"])
            best[at] = max(best.get(at, 0.0), row.get("tokens_per_second", 0.0))
    return best


def ratios(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every measured speed over that of the intact model in the same engine and cell."""
    rows = []
    for row in found["speed"]["rows"]:
        base = baselines(found, row["engine"]).get((row["context"], row["batch"]))
        if base and "tokens_per_second" in row:
            # Rows bring the ratio that was taken within their turn.
            rows.append({**row, "ratio": row.get("ratio", row["tokens_per_second"] / base)})
    return rows


def answer(found: dict[str, Any]) -> str:
    """Three sentences: the fastest row that holds, and the fastest of all."""
    if not found["speed"]:
        return ""
    rows = [row for row in ratios(found) if row["checkpoint"] != INTACT]
    if not rows:
        return ""
    said = []
    if not found["losses"]:
        said.append(
            "The losses of these folders are not recorded yet (`python benchmarks/worth.py --stage "
            "losses`); those of the same runs stand beside the recorded claims."
        )
    holds = []
    for row in rows:
        verdict = worst(found, row["checkpoint"], row["cache"])
        if verdict is not None and verdict["status"] == "holds":
            holds.append(row)
    if not found["losses"]:
        pass
    elif holds:
        best = max(holds, key=lambda row: row["ratio"])
        said.append(f"The fastest checkpoint whose verdict holds at 0.02 nats is {_named(best)}.")
    else:
        said.append("No slim checkpoint holds at 0.02 nats on every text and context.")
    best = max(rows, key=lambda row: row["ratio"])
    verdict = worst(found, best["checkpoint"], best["cache"])
    cost = "" if verdict is None else f", at {verdict['estimate']:+.3f} nats on its worst text"
    said.append(f"The fastest of all is {_named(best)}{cost}.")
    quantised = [r for r in ratios(found) if r["checkpoint"] == INTACT and r["cache"] == "q8_0"]
    if quantised:
        rival = max(quantised, key=lambda row: row["ratio"])
        verdict = worst(found, INTACT, "q8_0")
        cost = "" if verdict is None else f", at {verdict['estimate']:+.4f} nats"
        said.append(f"The intact model with its cache in q8_0 is at most {_times(rival)}{cost}.")
    return " ".join(said)


def _named(row: dict[str, Any]) -> str:
    rounded = f" {ROUNDED[row['cache']]}" if row["cache"] in ROUNDED else ""
    return f"{row['checkpoint']}{rounded} in {row['engine']}: {_times(row)}"


def _times(row: dict[str, Any]) -> str:
    return (
        f"× {row['ratio']:.2f} the intact model at {row['context']:,} tokens of context and "
        f"batch {row['batch']}"
    )


def losses(found: dict[str, Any]) -> str:
    """Rise of the loss by context."""
    rows = []
    for checkpoint, judged in found["losses"]["rows"].items():
        for cache in ("f32", *ROUNDED):
            if cache not in judged:
                continue
            cells = []
            for context in CONTEXTS:
                one = judged[cache].get(context)
                if one is None:
                    cells.append("–")
                    continue
                verdict = one["verdict"]
                cells.append(
                    f"{verdict['estimate']:+.3f} [{interval(verdict['interval'])}] "
                    f"{verdict['status']}"
                )
            share = found["checkpoints"].get(checkpoint, {})
            held = share.get("share_in_q8_0" if cache == "q8_0" else "share_of_intact")
            if checkpoint == INTACT:
                held = 34 / 32 / 2 if cache == "q8_0" else 1
            rows.append((checkpoint, cache, f"{held:.3g}" if held else "–", *cells))
    head = ["checkpoint", "cache", "cache bytes, share of f16", *CONTEXTS.values()]
    text = found["losses"]["text"]
    counts = "; ".join(
        f"{described['documents']} documents of {' and '.join(described['texts'])} at "
        f"{int(name):,} tokens"
        for name, described in text.items()
    )
    return (
        f"{table(head, rows)}\n\nRise of the loss in nats per token over the intact model on the "
        f"worst text, and its verdict at 0.02: {counts}. A cache in q8_0 is rounded in "
        "transformers as llama.cpp rounds it; in bf16 weights and cache are in that precision."
        f"{_untimed(found)}{_healing(found)}"
    )


def _untimed(found: dict[str, Any]) -> str:
    """Which checkpoints have a loss and no speed of their own."""
    timed = {row["checkpoint"] for row in (found["speed"] or {"rows": ()})["rows"]}
    names = [name for name in found["losses"]["rows"] if name not in timed]
    if not timed or not names:
        return ""
    return (
        f" Not timed: {', '.join(names)}. A speed depends on the widths and not on the text that "
        "healed: those named after a timed checkpoint have its widths, or nearly."
    )


def _healing(found: dict[str, Any]) -> str:
    """For how long the folders were trained."""
    said = [
        f"{name} for {healed['steps']} steps of {healed['batch']} documents"
        for name, about in found["checkpoints"].items()
        if (healed := about.get("healed", {})).get("steps")
    ]
    return f" Healed: {', '.join(said)}." if said else ""


def tasks(found: dict[str, Any]) -> str:
    """Tasks on which the intact model is above chance."""
    about = found.get("tasks")
    if not about:
        return not_yet("the tasks", "make worth")
    intact = {row["task"]: row for row in about["rows"] if row["label"] == INTACT}
    rows = [
        (
            row["label"],
            row["task"],
            f"{intact[row['task']]['exact_match']:.0%} → {row['exact_match']:.0%}",
            f"{intact[row['task']]['choice']:.0%} → {row['choice']:.0%}",
            f"{row['difference']:+.3f} ({interval(row['interval'])})",
        )
        for name in dict.fromkeys(row["label"] for row in about["rows"])
        for row in about["rows"]
        if row["label"] == name != INTACT
    ]
    head = ["checkpoint", "task", "exact", "chosen", "log-probability of the answer"]
    return (
        f"{_points_lost(about['rows'], intact)}\n\n{table(head, rows)}\n\n"
        f"{about['n']} prompts of {about['length']:,} tokens per task, the "
        "same for all models. *Exact*: greedy decoding gives the answer; *chosen*: it is likelier "
        "than every wrong one. The intact model is not above chance on "
        f"{', '.join(about['at_chance'])}, so a cut can lose nothing there that could be seen."
    )


def _points_lost(rows: list[dict[str, Any]], intact: dict[str, dict[str, Any]]) -> str:
    """One sentence: of each checkpoint the task on which it loses most exact answers."""
    most: dict[str, tuple[float, str]] = {}
    for row in rows:
        name = row["label"]
        if name != INTACT:
            lost = intact[row["task"]]["exact_match"] - row["exact_match"]
            most[name] = max(most.get(name, (0.0, "any task")), (lost, row["task"]))
    said = ", ".join(f"{name} {100 * lost:.0f} on {task}" for name, (lost, task) in most.items())
    return f"Tasks show what a mean loss hides. Points of exact answers lost at most: {said}."


def speeds(found: dict[str, Any]) -> str:
    """Tokens per second over the intact model's, per engine and cell."""
    rows = ratios(found)
    cells = sorted({(row["context"], row["batch"]) for row in rows})
    names = list(dict.fromkeys((r["engine"], r["checkpoint"], r["cache"]) for r in rows))
    by = {(r["engine"], r["checkpoint"], r["cache"], r["context"], r["batch"]): r for r in rows}
    lines = []
    for engine, checkpoint, cache in sorted(names, key=lambda n: n[0]):
        line = [engine, checkpoint, cache]
        for cell in cells:
            row = by.get((engine, checkpoint, cache, *cell))
            line.append(
                "–" if row is None else f"{row['tokens_per_second']:.0f} (× {row['ratio']:.2f})"
            )
        lines.append(line)
    turns = [len(row.get("turns", ())) for row in rows]
    said = f"{min(turns, default=0)} to {max(turns, default=0)}"
    spread = {
        key: max((max(t) / min(t) for row in rows if (t := row.get(key))), default=1.0)
        for key in ("turns", "ratios")
    }
    head = ["engine", "checkpoint", "cache", *(f"{c:,} × {b}" for c, b in cells)]
    return (
        f"{table(head, lines)}\n\nTokens per second while decoding, at context × batch; in "
        "brackets over the intact model in its best form in the same turn: that of gainlens' "
        "engine or transformers in Python, in f32 or bf16, that with a cache in f16 in llama.cpp. "
        "Medians of "
        f"{said} turns, each a process of its own (transformers' slower forms have one); one row "
        f"differs by up to × {spread['turns']:.2f} in speed and × {spread['ratios']:.2f} in its "
        "ratio between turns, so smaller differences say little. Precision: "
        f"{found['speed']['precision']}."
    )


def doubling(found: dict[str, Any]) -> str:
    """Whether anything doubles the speed where the cache outweighs the weights."""
    rows = [row for row in ratios(found) if row["checkpoint"] in found["checkpoints"]]
    sized = {n: f for n, f in found["checkpoints"].items() if "weight_bytes_f16" in f}
    if not rows or not sized:
        return ""
    context, batch = max({(r["context"], r["batch"]) for r in rows}, key=lambda c: c[0] * c[1])
    first = next(iter(sized.values()))
    weights, cache = first["weight_bytes_f16"], first["intact_cache_bytes_f16"] * context * batch
    lines = []
    for row in sorted(rows, key=lambda r: -r["ratio"]):
        if (row["context"], row["batch"]) != (context, batch) or row["checkpoint"] not in sized:
            continue
        if row["engine"].startswith("transformers"):
            continue
        about = sized[row["checkpoint"]]
        share = about["share_in_q8_0" if row["cache"] == "q8_0" else "share_of_intact"]
        bytes_alone = (weights + cache) / (about["weight_bytes_f16"] + share * cache)
        verdict = worst(found, row["checkpoint"], row["cache"])
        cost = "–" if verdict is None else f"{verdict['estimate']:+.3f}, {verdict['status']}"
        measured, alone = f"× {row['ratio']:.2f}", f"× {bytes_alone:.2f}"
        lines.append((row["checkpoint"], row["engine"], row["cache"], measured, alone, cost))
    head = ["checkpoint", "engine", "cache", "measured", "by bytes alone", "rise on the worst text"]
    return (
        f"Doubling, judged at {context:,} tokens × {batch}, where the intact cache is "
        f"{cache / weights:.1f} times the weights (both in f16):\n\n{table(head, lines)}"
    )


def in_float32(found: dict[str, Any]) -> str:
    """gainlens' engine beside llama.cpp, all in float32, and what takes the time."""
    about = found.get("float32")
    if not about:
        return ""
    rows = []
    for row in about["rows"]:
        seen, theirs = row["profile"], row.get("llama.cpp")
        first = list(seen["operations_ms"].items())[:4]
        parts = ", ".join(f"{name.removeprefix('aten::')} {ms:.1f}" for name, ms in first)
        rows.append(
            (
                f"{row['context']:,} × {row['batch']}",
                f"{row['gainlens']:.1f}",
                f"{theirs:.1f}" if theirs else "–",
                f"× {row['gainlens'] / theirs:.2f}" if theirs else "–",
                f"{seen['step_ms']:.1f}",
                parts,
                f"{(seen['weight_bytes'] + seen['cache_bytes']) / 1e6:,.0f}",
            )
        )
    head = ["context × batch", "gainlens", "llama.cpp", "ratio", "a step (ms)"]
    head += ["of which (ms)", "MB read a step"]
    return (
        f"{table(head, rows)}\n\n{about['checkpoint']}, weights and cache in float32 in both "
        "engines: tokens per second, and a profile of gainlens' step by operation. Neither engine "
        "can read the bytes of a step faster than memory gives them."
        f"{_batched(about['rows'])}"
    )


def _batched(rows: list[dict[str, Any]]) -> str:
    """What keeps ratios below those of the bytes: products that many rows make slower."""
    products: dict[tuple[int, int], float] = {}
    for row in rows:
        named = row["profile"]["operations_ms"].items()
        found = sum(ms for name, ms in named if name.removeprefix("aten::") in ("mm", "addmm"))
        products[row["context"], row["batch"]] = found
    for (context, batch), many in products.items():
        one = products.get((context, 1), 0.0)
        if batch > 1 and many > one > 0:
            return (
                f" At {context:,} tokens the products with the weights take {one:.0f} ms at batch "
                f"1 and {many:.0f} ms at batch {batch}, of the same bytes. They are nearly the "
                "same for every checkpoint, so ratios of a batch stay below those by bytes alone."
            )
    return ""


def limits(found: dict[str, Any]) -> str:
    """What was not run, and why: a line per reason."""
    by_reason: dict[str, list[str]] = {}
    for where, why in found["speed"]["limits"].items():
        by_reason.setdefault(why, []).append(where)
    for row in found["speed"]["not_run"]:
        by_reason.setdefault(row["not_run"], []).append(f"{row['context']:,} × {row['batch']}")
    for row in found["speed"]["rows"]:
        if "not_run" in row:
            where = f"{row['checkpoint']} in {row['engine']} ({row['cache']}) at "
            where += f"{row['context']:,} × {row['batch']}"
            by_reason.setdefault(row["not_run"], []).append(where)
    for name, why in found["not_made"].items():
        by_reason.setdefault(why, []).append(name)
    if not by_reason:
        return ""
    return table(["not run", "why"], [("; ".join(w), why) for why, w in by_reason.items()])


def picture(figure: Any, found: dict[str, Any]) -> None:
    """Loss against speed, a point per checkpoint and engine, and the Pareto front."""
    from gainlens.plots.axes import CYCLE, MARKERS

    axis = figure.subplots()
    rows = ratios(found)
    cell = max(
        {(row["context"], row["batch"]) for row in rows if row["batch"] > 1}
        or {(row["context"], row["batch"]) for row in rows}
    )
    points = []
    for row in rows:
        verdict = worst(found, row["checkpoint"], row["cache"]) or _of_the_run(row)
        if (row["context"], row["batch"]) == cell and verdict is not None:
            points.append((row["ratio"], max(verdict["estimate"], 0.0), row))
    engines = list(dict.fromkeys(row["engine"] for *_, row in points))
    for x, y, row in points:
        n = engines.index(row["engine"])
        axis.plot(
            x, y, linestyle="", marker=MARKERS[n], color=CYCLE[n], markersize=7,
            fillstyle=FILL.get(row["cache"], "full"),
        )  # fmt: skip
    # A checkpoint costs nearly the same in every engine and cache: one name for all of its points.
    for name in dict.fromkeys(row["checkpoint"] for *_, row in points):
        x, y = min((x, y) for x, y, row in points if row["checkpoint"] == name)
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(-5, 6), fontsize=8)
    for n, engine in enumerate(engines):
        axis.plot([], [], linestyle="", marker=MARKERS[n], color=CYCLE[n], label=engine)
    for cache, fill in FILL.items():
        axis.plot([], [], linestyle="", marker="o", color="0.3", fillstyle=fill, label=cache)
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    axis.plot(*zip(*front, strict=True), color="0.5", linewidth=1, label="Pareto front")
    axis.axhline(0.02, color="black", linestyle="--", linewidth=0.8, label="margin: 0.02 nats")
    axis.set_yscale("symlog", linthresh=0.02)
    axis.set_ylim(-0.01, 2.5 * max(y for _, y, _ in points))
    axis.set_xlabel(f"speed over the intact model, {cell[0]:,} tokens of context × {cell[1]}")
    axis.set_ylabel("rise of the loss (nats per token)")
    axis.legend(fontsize=7, loc="lower right")
