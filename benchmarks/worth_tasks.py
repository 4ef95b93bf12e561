"""What the checkpoints of the worth ledger score on tasks whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gainlens as gl
from gainlens.analysis.task_running import score_models
from gainlens.analysis.task_scores import INTACT
from gainlens.export.judging import last_logits
from gainlens.model.context import context_of


def on_tasks(
    folders: Mapping[str, Path], intact: Any, tokenizer: Any, length: int, n: int, seed: int
) -> dict[str, Any]:
    """Rows of every checkpoint on the tasks on which the intact model is above chance.

    The intact model is asked all tasks. What it cannot do, no cut can lose.
    """
    options = {"lengths": (length,), "n": n, "seed": seed}
    context = context_of(intact)
    alone = score_models({INTACT: partial(last_logits, intact)}, tokenizer, context, **options)
    can = tuple(row.task for row in alone.rows if row.shows)
    print({row.task: (row.choice, row.chance, row.shows) for row in alone.rows}, flush=True)
    models = {INTACT: intact} | {name: gl.load_slim(folder) for name, folder in folders.items()}
    asked = {name: partial(last_logits, model) for name, model in models.items()}
    scores = score_models(asked, tokenizer, context, tasks=can, **options)
    return {
        "length": length,
        "n": n,
        "at_chance": [row.task for row in alone.rows if not row.shows],
        "rows": [asdict(row) | {"interval": list(row.interval)} for row in scores.rows],
    }
