"""The three most frequent of made-up words (RULER's frequent words, Hsieh et al. 2024)."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from gainlens.analysis.tasks.base import CHOICES, Example, Task, Writer, drawing

NAME = "frequent_words"
ALPHA = 2.0
"""Exponent of Zipf's law: the word of rank k occurs in proportion to k to the power of -2."""
ASKED = 3
LEAST = 45
"""Entries from which the first four frequencies differ."""
LETTERS = 6
VOCABULARY = 48
HEADER = "\nIn this coded text some coded words occur more often than others.\n"


def counts(entries: int) -> list[int]:
    """How often the word of each rank occurs, at least once."""
    weights = [rank**-ALPHA for rank in range(1, VOCABULARY + 1)]
    return [max(1, int(entries * weight / sum(weights))) for weight in weights]


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """The answer is the three words by falling frequency; published is the set of three.

    The wrong answers begin with the words of rank 2 to 8.
    """
    writer = Writer(NAME, tokenizer, length)
    asked = (
        f"\nQuestion: What are the {ASKED} most frequent coded words, the most frequent first?\n"
        f"Answer: The {ASKED} most frequent coded words are"
    )
    examples = []
    for number in range(n):
        drawn = drawing(NAME, seed, number)
        words: dict[str, None] = {}
        while len(words) < VOCABULARY:
            words["".join(drawn.choices(ascii_lowercase, k=LETTERS))] = None
        ranked = [
            answer.strip()
            for answer in writer.told_apart(" are", [f" {word}" for word in words], CHOICES)
        ]
        drawn.shuffle(ranked)  # after the choice of the eight, so that each may be the first
        told = len(ranked)
        ranked += [word for word in words if word not in ranked]
        answers = [f" {', '.join(ranked[:ASKED])}", *(f" {word}" for word in ranked[1:told])]

        def body(
            entries: int, ranked: list[str] = ranked, order: int = drawn.getrandbits(32)
        ) -> list[str]:
            text = [w for w, c in zip(ranked, counts(entries), strict=True) for _ in range(c)]
            drawing(NAME, order, entries).shuffle(text)
            return [HEADER, "".join(f" {word}" for word in text)]

        found = writer.largest(body, LEAST, asked, answers[0])
        examples.append(writer.example(found, asked, answers))
    return examples


FREQUENT_WORDS = Task(
    NAME, "contextual", make, "the three most frequent words of a text with Zipf's frequencies"
)
