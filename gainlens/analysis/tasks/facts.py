"""Facts to complete, which stand nowhere in the prompt: what the two parametric tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gainlens.analysis.tasks.base import CHOICES, Example, Writer, drawing


def facts(
    task: str,
    ask: Callable[[str], str],
    table: Mapping[str, str],
    tokenizer: Any,
    length: int,
    n: int,
    seed: int,
) -> list[Example]:
    """Each fact at most once, after filler up to the length; the wrong answers are other facts'.

    Facts whose answers start alike with this tokenizer are left out, so that one token tells the
    answers apart.

    Args:
        task: its name.
        ask: from the subject to the question.
        table: from subject to answer.
        tokenizer, length, n, seed: see ``gainlens.analysis.tasks.base.Make``.
    """
    writer = Writer(task, tokenizer, length)
    subjects = {f" {answer}": subject for subject, answer in table.items()}
    shuffled = drawing(task, seed, -1).sample(sorted(subjects), len(subjects))
    pool = writer.told_apart(" is", shuffled, len(shuffled))
    # Answers that start like many others come early, and the first n are asked for.
    drawing(task, seed, -2).shuffle(pool)
    examples = []
    for number, right in enumerate(pool[:n]):
        others = [answer for answer in pool if answer != right]
        wrong = drawing(task, seed, number).sample(others, min(CHOICES - 1, len(others)))
        question = ask(subjects[right])
        body = writer.in_noise("", question, right, [])
        examples.append(writer.example(body, question, [right, *wrong]))
    return examples
