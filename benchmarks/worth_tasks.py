"""What the checkpoints of the worth ledger score on tasks whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gainlens as gl
from gainlens.analysis.task_running import score_models
from gainlens.analysis.task_scores import INTACT, TaskScores
from gainlens.export.judging import last_logits
from gainlens.files import read_json, write_json
from gainlens.model.context import context_of


def on_tasks(
    folders: Mapping[str, tuple[Path, str]],
    intact: Any,
    tokenizer: Any,
    length: int,
    n: int,
    seed: int,
    work: Path,
) -> dict[str, Any]:
    """Rows of every checkpoint on the tasks on which the intact model is above chance.

    The intact model is asked all tasks. What it cannot do, no cut can lose. Each row is paired with
    the intact model alone, so those of a checkpoint are kept in ``work`` and serve later runs.

    Args:
        folders: the folder of each checkpoint, and a digest of it.
        intact: the original.
        tokenizer: of all of them.
        length, n, seed: tokens, prompts and seed of a task.
        work: folder for what is done.
    """
    options = {"lengths": (length,), "n": n, "seed": seed}
    context = context_of(intact)
    asked = f"tasks_{length}_{n}_{seed}"
    first = work / f"{asked}.json"
    if not first.exists():
        alone = score_models({INTACT: partial(last_logits, intact)}, tokenizer, context, **options)
        write_json(first, {"rows": rows_of(alone)})
    alone_rows = read_json(first)["rows"]
    print({r["task"]: (r["choice"], r["chance"], r["shows"]) for r in alone_rows}, flush=True)
    can = tuple(row["task"] for row in alone_rows if row["shows"])
    kept = {name: work / f"{asked}_{digest}.json" for name, (_, digest) in folders.items()}
    missing = [name for name, file in kept.items() if not file.exists()]
    if missing:
        models = {INTACT: intact} | {name: gl.load_slim(folders[name][0]) for name in missing}
        last = {name: partial(last_logits, model) for name, model in models.items()}
        rows = rows_of(score_models(last, tokenizer, context, tasks=can, **options))
        for name in missing:
            write_json(kept[name], {"rows": [row for row in rows if row["label"] == name]})
    rows = [row for row in alone_rows if row["task"] in can]
    rows += [row | {"label": name} for name in kept for row in read_json(kept[name])["rows"]]
    return {
        "length": length,
        "n": n,
        "at_chance": [row["task"] for row in alone_rows if not row["shows"]],
        "rows": rows,
    }


def rows_of(scores: TaskScores) -> list[dict[str, Any]]:
    """As they are written."""
    return [asdict(row) | {"interval": list(row.interval)} for row in scores.rows]
