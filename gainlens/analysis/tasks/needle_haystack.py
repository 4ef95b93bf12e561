"""A haystack that is all needles (RULER's ``niah_multikey_2``, Hsieh et al. 2024)."""

from __future__ import annotations

from typing import Any

from gainlens.analysis.tasks.base import CHOICES, Example, Task, Writer, drawing, spread_depths
from gainlens.analysis.tasks.needle import DIGITS, header, question, sentence, values
from gainlens.analysis.tasks.words import WORDS

NAME = "needle_haystack"


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """Keys are pairs of words; the needles come in eights that share no first digit.

    The wrong answers are the seven numbers that were drawn with the right one.
    """
    writer = Writer(NAME, tokenizer, length)
    examples = []
    most = CHOICES * (length // (CHOICES * DIGITS) + 1)  # a needle is longer than its digits
    for number, depth in enumerate(spread_depths(n)):
        drawn = drawing(f"{NAME} keys", seed, number)
        pairs: dict[str, None] = {}
        while len(pairs) < most:
            pairs["-".join(drawn.sample(WORDS, 2))] = None
        keys = list(pairs)
        numbers = values(drawing(f"{NAME} values", seed, number), most)
        order = drawing(f"{NAME} order", seed, number).getrandbits(32)
        answers = [f" {value}" for value in numbers[:CHOICES]]

        def body(
            eights: int,
            keys: list[str] = keys,
            numbers: list[str] = numbers,
            depth: float = depth,
            order: int = order,
        ) -> list[str]:
            taken = zip(keys[: CHOICES * eights], numbers, strict=False)
            asked, *others = [sentence(key, value) for key, value in taken]
            drawing(NAME, order, eights).shuffle(others)
            others.insert(round(depth * len(others)), asked)
            return [header("numbers"), "".join(others)]

        found = writer.largest(body, 1, question(keys[0]), answers[0])
        examples.append(writer.example(found, question(keys[0]), answers, depth))
    return examples


NEEDLE_HAYSTACK = Task(
    NAME, "contextual", make, "the number of one key in a text of nothing but such sentences"
)
