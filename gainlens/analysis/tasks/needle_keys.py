"""Four needles in filler, one asked for (RULER's ``niah_multikey_1``, Hsieh et al. 2024)."""

from __future__ import annotations

from typing import Any

from gainlens.analysis.tasks.base import Example, Task, Writer, drawing, spread_depths
from gainlens.analysis.tasks.needle import header, question, sentence, values
from gainlens.analysis.tasks.words import WORDS

KEYS = 4


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """The wrong answers are the numbers of the other keys; their depths are random."""
    writer = Writer("needle_keys", tokenizer, length)
    examples = []
    for number, depth in enumerate(spread_depths(n)):
        drawn = drawing("needle_keys", seed, number)
        keys = drawn.sample(WORDS, KEYS)
        answers = [f" {value}" for value in values(drawn, KEYS)]
        depths = [depth, *(drawn.random() for _ in keys[1:])]
        needles = [sentence(key, value.strip()) for key, value in zip(keys, answers, strict=True)]
        inserted = sorted(zip(depths, needles, strict=True))
        body = writer.in_noise(header("numbers"), question(keys[0]), answers[0], inserted)
        examples.append(writer.example(body, question(keys[0]), answers, depth))
    return examples


NEEDLE_KEYS = Task(
    "needle_keys", "contextual", make, "the number of one key among four keys in filler"
)
