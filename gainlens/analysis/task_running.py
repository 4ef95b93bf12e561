"""Scores on tasks whose answers are known, intact and cut, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.task_scores import INTACT, GroupRow, TaskRow, TaskScores
from gainlens.analysis.tasks import TASKS
from gainlens.analysis.tasks.base import Example, Task
from gainlens.data.batches import TOKENS_PER_BATCH
from gainlens.errors import InputError
from gainlens.model.context import context_of
from gainlens.model.hooks import check_intact
from gainlens.stats.intervals import bootstrap_interval

ERROR = 0.01
"""A task shows something if the intact model chooses so often right with at most this chance."""
LEVEL = 0.95

LastLogits = Callable[[torch.Tensor, int], torch.Tensor]
"""From tokens ``[document, pos]`` and a number n to the logits ``[document, n, vocab]`` of the last
n positions."""


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
    tokenizer = getattr(model, "tokenizer", None)
    _check_settings(tokenizer, n)
    evaluator = evaluator_of(model, evaluator)
    shape = tuple(evaluator.sites.shape)
    for label, given in cuts.items():
        if label == INTACT or tuple(given.shape) != shape:
            raise InputError(
                f"cuts[{label!r}] of shape {tuple(given.shape)}: expected another label than "
                f"{INTACT!r} and the model's shape {shape}"
            )
    found = score_models(
        {
            INTACT: evaluator.last_logits,
            **{label: partial(evaluator.last_logits, cut=cut) for label, cut in cuts.items()},
        },
        tokenizer,
        context_of(model),
        tasks=tasks,
        lengths=lengths,
        n=n,
        seed=seed,
        progress=progress,
    )
    return replace(found, facts={"model": evaluator.fingerprint, **found.facts})


def score_models(
    models: Mapping[str, LastLogits],
    tokenizer: Any,
    context: int | None,
    *,
    tasks: Sequence[str | Task] = tuple(TASKS),
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    n: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> TaskScores:
    """As ``score_tasks``, of any models with one tokenizer.

    Args:
        models: by label, the one that the others are compared with first: a function from tokens
            ``[document, pos]`` and a number n to the logits of the last n positions.
        tokenizer: theirs.
        context: tokens that they read, if limited.
        tasks, lengths, n, seed, progress: as for ``score_tasks``.

    Raises:
        InputError: as for ``score_tasks``.
    """
    chosen = _chosen(tasks)
    _check_settings(tokenizer, n)
    _check_lengths(lengths, context)
    made = {
        (task, length): task.make(tokenizer, length, n, seed)
        for length in lengths
        for task in chosen
    }
    rows: list[TaskRow] = []
    kept: dict[tuple[int, str], list[tuple[TaskRow, Float[np.ndarray, " prompt"]]]] = {}
    with tqdm(total=len(made) * len(models), desc="tasks", disable=not progress) as bar:
        for (task, length), examples in made.items():
            intact: TaskRow | None = None
            base = np.zeros(len(examples))
            for label, last_logits in models.items():
                scores = _scores(last_logits, examples)
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
    return TaskScores(tuple(rows), tuple(groups), {"seed": seed, "n": n})


def fitting_tasks(
    tokenizer: Any, lengths: Sequence[int], n: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """The tasks that can be written in these lengths, and why the others can't.

    Args:
        tokenizer: of the model.
        lengths, n, seed: as for ``score_tasks``.
    """
    found, why = [], []
    for name, task in TASKS.items():
        try:
            for length in lengths:
                task.make(tokenizer, length, n, seed)
            found.append(name)
        except InputError as error:
            why.append(f"task {name}: {error}")
    return found, why


def above_chance(hits: int, n: int, chance: float) -> bool:
    """Whether guessing would be right so often with a probability of at most ``ERROR``."""
    return bool(stats.binom.sf(hits - 1, n, chance) <= ERROR)


def _chosen(tasks: Sequence[str | Task]) -> list[Task]:
    found = [TASKS.get(task) if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in found if isinstance(task, Task)]
    if isinstance(tasks, str) or not found or len(set(names)) != len(found):
        raise InputError(f"tasks={tasks!r}: expected different ones of {', '.join(TASKS)}")
    return [task for task in found if task is not None]


def _check_settings(tokenizer: Any, n: int) -> None:
    if tokenizer is None:
        raise InputError("model has no tokenizer: expected one as model.tokenizer")
    if not isinstance(n, int) or n < 2:
        raise InputError(f"n={n!r}: expected 2 prompts or more")


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


def _scores(last_logits: LastLogits, examples: list[Example]) -> Scores:
    size = max(1, TOKENS_PER_BATCH // len(examples[0].tokens))
    logs, exact, choice = [], [], []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(len(example.answer) for example in part)
        batch = torch.stack([example.tokens for example in part])
        logits = last_logits(batch, longest + 1)
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
