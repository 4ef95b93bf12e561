"""Progress of a report, with one estimate of the total remaining time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from gainlens.analysis.tasks import TASKS
from gainlens.data.loading import text_names

if TYPE_CHECKING:
    from gainlens.report.build import Plan

FORMAT = "{desc}: {percentage:3.0f}% done, {elapsed} so far, about {remaining} left"


def stage_costs(plan: Plan, shape: tuple[int, int, int]) -> dict[str, float]:
    """The cost of each stage of a report, in tokens that pass through the model.

    Args:
        plan: the settings of the report.
        shape: ``(n_layers, n_kv_heads, d_head)`` of the model.
    """
    layers, heads, d_head = shape
    text = plan.n_docs * plan.length
    evidence = min(plan.evidence_docs, plan.n_docs) * plan.length
    damage = min(plan.damage_docs, plan.n_docs) * min(plan.damage_length, plan.length)
    given = 2 if plan.refit_rounds else 0
    bisections = math.log2(max(2, d_head // 2))
    return {
        "probe": text,
        # A backward pass counts as two forward passes.
        "refit": 3 * min(8, plan.n_docs) * plan.length + 2 * text if plan.refit_rounds else 0,
        "surgery": (len(plan.all_fractions) * (2 + len(plan.seeds)) + 1 + given) * text,
        # A single place is run from its layer on, which is half of the model on average.
        "damage": layers * (1 + heads) * damage / 2,
        "reach": _reach_cost(plan, given + 1),
        "map": evidence * (35 + 6 * bisections) + damage * d_head / 2,
    }


def _reach_cost(plan: Plan, n_cuts: int) -> float:
    """Of the stage after the sweep; tokens that pass through the model."""
    n_texts = len(text_names(plan.text))
    position = (1 + n_cuts) * n_texts * plan.long_docs * plan.context
    across = 0.0
    if n_texts > 1 and plan.across_docs:
        fit = 5 * plan.n_docs * plan.length
        across = n_texts * (fit + (1 + n_texts) * plan.across_docs * plan.length)
    price = 0.0
    if plan.price_docs and plan.refit_rounds:
        cuts, fits = 9, 6
        price = (1 + cuts) * n_texts * plan.price_docs * plan.length
        price += fits * 3 * plan.n_docs * plan.length
    prompts = plan.task_prompts if plan.task_prompts > 1 else 0
    return position + across + price + 2 * len(TASKS) * prompts * plan.task_length


class Stages:
    """The progress bar of a whole report.

    Args:
        costs: costs of the stages in order, in any common unit.
        shown: whether to show anything.
    """

    def __init__(self, costs: Mapping[str, float], *, shown: bool = True) -> None:
        self._costs = dict(costs)
        self._bar = tqdm(total=sum(costs.values()), bar_format=FORMAT, disable=not shown)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show that a stage is running, and count it at the end."""
        number = list(self._costs).index(name) + 1
        self._bar.set_description(f"report, stage {number} of {len(self._costs)} ({name})")
        yield
        self._bar.update(self._costs[name])

    def close(self) -> None:
        """Close the bar in its current state."""
        self._bar.close()
