"""One needle in a haystack of filler (RULER's ``niah_single_1``, Hsieh et al. 2024)."""

from __future__ import annotations

from random import Random
from typing import Any

from gainlens.analysis.tasks.base import CHOICES, Example, Task, Writer, drawing, spread_depths
from gainlens.analysis.tasks.words import WORDS

DIGITS = 7


def sentence(key: str, value: str) -> str:
    """The needle."""
    return f" The magic number of {key} is {value}."


def question(key: str) -> str:
    """What the value answers."""
    return f"\nQuestion: What is the magic number of {key}?\nAnswer: The magic number of {key} is"


def header(what: str) -> str:
    """The beginning of the prompt."""
    return f"\nRemember the magic {what} in this text.\n"


def values(drawn: Random, n: int) -> list[str]:
    """Numbers of seven digits, no first digit twice among each eight in turn."""
    found: list[str] = []
    while len(found) < n:
        for first in drawn.sample("123456789", CHOICES):
            found.append(first + "".join(drawn.choices("0123456789", k=DIGITS - 1)))
    return found[:n]


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """The wrong answers are numbers that do not occur in the prompt."""
    writer = Writer("needle", tokenizer, length)
    examples = []
    for number, depth in enumerate(spread_depths(n)):
        drawn = drawing("needle", seed, number)
        key = drawn.choice(WORDS)
        answers = [f" {value}" for value in values(drawn, CHOICES)]
        inserted = [(depth, sentence(key, answers[0].strip()))]
        body = writer.in_noise(header("number"), question(key), answers[0], inserted)
        examples.append(writer.example(body, question(key), answers, depth))
    return examples


NEEDLE = Task("needle", "contextual", make, "the number that one sentence in filler gives to a key")
