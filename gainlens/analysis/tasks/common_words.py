"""The words that occur ten times as often as others (RULER's common words, Hsieh et al. 2024)."""

from __future__ import annotations

from math import ceil
from typing import Any

from gainlens.analysis.tasks.base import CHOICES, Example, Task, Writer, drawing
from gainlens.analysis.tasks.words import WORDS

NAME = "common_words"
COMMON = 10
RATIO = 10
HEADER = "\nSome words in this numbered list occur more often than the others.\n"


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """Nine of the ten common words are given, in random order; the tenth is the answer.

    Published is the set of ten in any order, which has no log-probability of its own. The list
    grows to the length: each other word occurs as often as it must for the words to suffice. The
    wrong answers are words of the list that are not common.
    """
    writer = Writer(NAME, tokenizer, length)
    examples = []
    for number in range(n):
        drawn = drawing(NAME, seed, number)
        shuffled = drawn.sample(WORDS, len(WORDS))
        stub = " are"
        answers = writer.told_apart(stub, [f" {word}" for word in shuffled], CHOICES)
        drawn.shuffle(answers)  # after the choice of the eight, so that each may be the right one
        wrong = [answer.strip() for answer in answers[1:]]
        rest = [word for word in shuffled if f" {word}" not in answers]
        given, others = rest[: COMMON - 1], wrong + rest[COMMON - 1 :]
        common = [*given, answers[0].strip()]
        asked = (
            f"\nQuestion: What are the {COMMON} most common words in the list?\n"
            f"Answer: The {COMMON} most common words are {', '.join(given)} and"
        )

        def body(
            entries: int,
            common: list[str] = common,
            others: list[str] = others,
            order: int = drawn.getrandbits(32),
        ) -> list[str]:
            times = ceil(entries / (COMMON * RATIO + len(others)))
            n_others = max(CHOICES - 1, entries // times - COMMON * RATIO)
            words = times * (RATIO * common + others[:n_others])
            drawing(NAME, order, entries).shuffle(words)
            return [HEADER, "".join(f" {i}. {word}" for i, word in enumerate(words, 1))]

        found = writer.largest(body, COMMON * RATIO + CHOICES - 1, asked, answers[0])
        examples.append(writer.example(found, asked, answers))
    return examples


COMMON_WORDS = Task(
    NAME, "contextual", make, "the tenth of ten words that a list has ten times as often as others"
)
