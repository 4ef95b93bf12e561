"""Scores on tasks whose answers are known, intact and cut, on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.tasks import TASKS
from gainlens.analysis.tasks.base import Example, Task
from gainlens.data.batches import TOKENS_PER_BATCH
from gainlens.errors import InputError
from gainlens.files import FORMAT
from gainlens.frames import data_frame
from gainlens.model.context import context_of
from gainlens.model.hooks import check_intact
from gainlens.stats.intervals import bootstrap_interval

INTACT = "intact"
ERROR = 0.01
"""A task shows something if the intact model chooses so often right with at most this chance."""
LEVEL = 0.95


@dataclass(frozen=True)
class TaskRow:
    """One model on one task at one length.

    Attributes:
        task: its name.
        group: ``contextual``, the answer stands in the prompt, or ``parametric``.
        length: of prompt and answer, in tokens.
        label: of the cut, or ``intact``.
        log_probability: of the right answer, mean over its tokens and over prompts, nats per
            token.
        difference: from the intact model on the same prompts; below 0 the cut makes the right
            answer less likely.
        interval: of the difference, 95%, bootstrap-t over prompts.
        exact_match: share of prompts after which greedy decoding gives the whole answer.
        choice: share of prompts after which the right answer is more likely than each wrong one,
            at the first token in which they differ.
        chance: ``choice`` of a model that does not know.
        shows: whether the intact model's ``choice`` is above chance (one-sided binomial test at
            1%); if not, the row says nothing about the cut.
        n: number of prompts.
    """

    task: str
    group: str
    length: int
    label: str
    log_probability: float
    difference: float
    interval: tuple[float, float]
    exact_match: float
    choice: float
    chance: float
    shows: bool
    n: int


@dataclass(frozen=True)
class GroupRow:
    """One cut on all prompts of the tasks of a group that show something.

    Attributes:
        group, length, label, difference, interval: as in ``TaskRow``.
        tasks: those that show something.
        n: number of prompts.
    """

    group: str
    length: int
    label: str
    tasks: tuple[str, ...]
    difference: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What ``score_tasks`` found.

    Attributes:
        rows: one per task, length and model, the intact one first.
        groups: contextual and parametric tasks, per length and cut; without the tasks that show
            nothing.
        facts: model, seed, number of prompts asked for.
    """

    rows: tuple[TaskRow, ...]
    groups: tuple[GroupRow, ...]
    facts: dict[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per task, length and model."""
        return [dict(vars(row)) for row in self.rows]

    def find(self, **wanted: Any) -> list[TaskRow]:
        """Rows with these values, e.g. ``task="needle", length=1024``."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "kind": "task_scores",
            "facts": self.facts,
            "rows": self.table(),
            "groups": [dict(vars(row)) for row in self.groups],
        }

    def to_dataframe(self) -> Any:
        """The rows of ``table``; see ``TaskRow`` for the units.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def summary(self) -> str:
        """One line per row; a task on which the intact model is at chance shows nothing."""
        lines = []
        for row in self.rows:
            if not row.shows:
                if row.label == INTACT:
                    lines.append(
                        f"{row.task} at {row.length:,} tokens shows nothing: the intact model is "
                        f"at chance ({row.choice:.0%} right of {row.n}, chance {row.chance:.0%})"
                    )
                continue
            line = f"{row.task} at {row.length:,} tokens, {row.label}: {row.exact_match:.0%} exact"
            if row.label != INTACT:
                low, high = row.interval
                line += f", {row.difference:+.3f} [{low:+.3f}, {high:+.3f}] nats per answer token"
            lines.append(line)
        return "\n".join(lines)

    def __repr__(self) -> str:
        tasks = {(row.task, row.length): row.shows for row in self.rows}
        labels = list(dict.fromkeys(row.label for row in self.rows))
        shown = sum(tasks.values())
        return f"TaskScores({', '.join(labels)}; {shown} of {len(tasks)} tasks show something)"


def score_tasks(
    model: Any,
    cuts: Mapping[str, Cut],
    *,
    tasks: Sequence[str | Task] = tuple(TASKS),
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    n: int = 24,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> TaskScores:
    """Score the intact and the cut model on tasks that a mean loss hardly shows.

    The prompts are synthetic and the same for every model, so the differences are paired. The
    contextual tasks are RULER's that need no other data (Hsieh et al. 2024, arXiv:2404.06654);
    the parametric ones complete a fact after filler of the same length.

    Args:
        model: a TransformerBridge or HookedTransformer with a tokenizer.
        cuts: by label; none scores the intact model alone.
        tasks: names (``gainlens.analysis.tasks.TASKS``) or tasks.
        lengths: of prompt and answer together, in tokens, within the model's context.
        n: prompts per task and length; parametric tasks have no more than they have facts.
        seed: of the prompts.
        evaluator: of this model, where several calls share one.
        progress: show a progress bar.

    Raises:
        InputError: a model without a tokenizer, an unknown task, a length beyond the model's
            context or too short for a task, fewer than 2 prompts, a cut of another model.

    Example:
        >>> scores = gl.analysis.score_tasks(model, {"half": mask}, lengths=(1024, 4096))
        >>> print(scores.summary())
        >>> scores.find(task="needle", label="half")[0].difference  # nats per answer token
    """
    check_intact(model, "score_tasks")
    chosen = _chosen(tasks)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("model has no tokenizer: expected one as model.tokenizer")
    if not isinstance(n, int) or n < 2:
        raise InputError(f"n={n!r}: expected 2 prompts or more")
    _check_lengths(lengths, context_of(model))
    evaluator = evaluator_of(model, evaluator)
    shape = tuple(evaluator.sites.shape)
    for label, given in cuts.items():
        if label == INTACT or tuple(given.shape) != shape:
            raise InputError(
                f"cuts[{label!r}] of shape {tuple(given.shape)}: expected another label than "
                f"{INTACT!r} and the model's shape {shape}"
            )
    made = {
        (task, length): task.make(tokenizer, length, n, seed)
        for length in lengths
        for task in chosen
    }
    rows: list[TaskRow] = []
    kept: dict[tuple[int, str], list[tuple[TaskRow, Float[np.ndarray, " prompt"]]]] = {}
    todo: dict[str, Cut | None] = {INTACT: None, **cuts}
    with tqdm(total=len(made) * len(todo), desc="tasks", disable=not progress) as bar:
        for (task, length), examples in made.items():
            intact: TaskRow | None = None
            base = np.zeros(len(examples))
            for label, cut in todo.items():
                scores = _scores(evaluator, examples, cut)
                if intact is None:
                    base = scores[0]
                row = _row(task, length, label, examples, scores, base)
                intact = intact or row
                row = replace(row, shows=intact.shows)
                rows.append(row)
                if row.shows:
                    kept.setdefault((length, label), []).append((row, scores[0] - base))
                bar.update()
    groups = [
        _group(group, length, label, [(r, d) for r, d in found if r.group == group])
        for (length, label), found in kept.items()
        for group in dict.fromkeys(row.group for row, _ in found)
    ]
    facts = {"model": evaluator.fingerprint, "seed": seed, "n": n}
    return TaskScores(tuple(rows), tuple(groups), facts)


def above_chance(hits: int, n: int, chance: float) -> bool:
    """Whether guessing would be right so often with a probability of at most ``ERROR``."""
    return bool(stats.binom.sf(hits - 1, n, chance) <= ERROR)


def _chosen(tasks: Sequence[str | Task]) -> list[Task]:
    found = [TASKS.get(task) if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in found if isinstance(task, Task)]
    if isinstance(tasks, str) or not found or len(set(names)) != len(found):
        raise InputError(f"tasks={tasks!r}: expected different ones of {', '.join(TASKS)}")
    return [task for task in found if task is not None]


def _check_lengths(lengths: Sequence[int], context: int | None) -> None:
    right = not isinstance(lengths, int) and all(isinstance(x, int) and x > 0 for x in lengths)
    if not right or not lengths or len(set(lengths)) != len(lengths):
        raise InputError(f"lengths={lengths!r}: expected different numbers of tokens")
    if context is not None and max(lengths) > context:
        raise InputError(
            f"lengths={lengths!r}: expected at most the model's context of {context} tokens"
        )


Scores = tuple[
    Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]
]
"""Log-probability of the answer per token, whether it is exact, whether it is chosen."""


def _scores(evaluator: Evaluator, examples: list[Example], cut: Cut | None) -> Scores:
    size = max(1, TOKENS_PER_BATCH // len(examples[0].tokens))
    logs, exact, choice = [], [], []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(len(example.answer) for example in part)
        batch = torch.stack([example.tokens for example in part])
        logits = evaluator.last_logits(batch, longest + 1, cut)
        for example, last in zip(part, logits, strict=True):
            before = last[-len(example.answer) - 1 : -1]  # the last position predicts nothing
            found = before.double().log_softmax(-1)
            mean = float(found.gather(1, example.answer[:, None]).mean())
            if not np.isfinite(mean):
                raise InputError(
                    "a log-probability is not finite; expected weights without NaN or infinity"
                )
            at = found[example.at, example.choices]
            logs.append(mean)
            exact.append(float((before.argmax(-1) == example.answer).all()))
            choice.append(float(at[0] > at[1:].max()))
    return np.array(logs), np.array(exact), np.array(choice)


def _row(
    task: Task,
    length: int,
    label: str,
    examples: list[Example],
    scores: Scores,
    base: Float[np.ndarray, " prompt"],
) -> TaskRow:
    logs, exact, choice = scores
    chance = 1 / max(1, min(len(example.choices) for example in examples))
    difference = logs - base
    return TaskRow(
        task=task.name,
        group=task.group,
        length=length,
        label=label,
        log_probability=float(logs.mean()),
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference, LEVEL),
        exact_match=float(exact.mean()),
        choice=float(choice.mean()),
        chance=chance,
        shows=above_chance(int(choice.sum()), len(examples), chance),
        n=len(examples),
    )


def _group(
    group: str,
    length: int,
    label: str,
    found: list[tuple[TaskRow, Float[np.ndarray, " prompt"]]],
) -> GroupRow:
    differences = np.concatenate([difference for _, difference in found])
    return GroupRow(
        group=group,
        length=length,
        label=label,
        tasks=tuple(row.task for row, _ in found),
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences, LEVEL),
        n=len(differences),
    )
