"""Chains of assignments in filler (RULER's variable tracking, Hsieh et al. 2024)."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase
from typing import Any

from gainlens.analysis.tasks.base import Example, Task, Writer, drawing

NAME = "variable_tracking"
LETTERS = 5
CHAINS = 4
"""Values; chance is one in as many."""
HOPS = 4
"""Assignments of a variable to a variable in each chain, as published."""


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """All variables of one value, in the order of their chain, the number of them being known.

    The wrong answers end in the last variable of another chain, so the right one takes every hop.
    """
    writer = Writer(NAME, tokenizer, length)
    examples = []
    for number in range(n):
        drawn = drawing(NAME, seed, number)
        names = _names(drawn, CHAINS * (HOPS + 1))
        ends = writer.told_apart(",", [f" {name}" for name in names], CHAINS)
        drawn.shuffle(ends)  # after the choice, so that each may end the chain that is asked for
        last = [end.strip() for end in ends]
        names = [name for name in names if name not in last]
        last += names[: CHAINS - len(last)]
        names = [name for name in names if name not in last]
        of_chain = [[*names[start::CHAINS], last[start]] for start in range(CHAINS)]
        numbers = [str(x) for x in drawn.sample(range(10_000, 100_000), CHAINS)]
        statements = [
            [
                f" VAR {variable} = {source}."
                for variable, source in zip(
                    chain, [value, *(f"VAR {x}" for x in chain[:-1])], strict=True
                )
            ]
            for chain, value in zip(of_chain, numbers, strict=True)
        ]
        order = [chain for chain in range(CHAINS) for _ in range(HOPS + 1)]
        drawn.shuffle(order)
        depths = sorted(drawn.random() for _ in order)
        inserted = [(d, statements[chain].pop(0)) for d, chain in zip(depths, order, strict=True)]
        asked = (
            f"\nQuestion: Which {HOPS + 1} variables have the value {numbers[0]}, directly or "
            f"through other variables?\nAnswer: The variables of value {numbers[0]} are"
        )
        first = "".join(f" {name}," for name in of_chain[0][:-1])
        answers = [first + end for end in ends]
        header = "\nFollow the chains of assignments in this text.\n"
        body = writer.in_noise(header, asked, answers[0], inserted)
        examples.append(writer.example(body, asked, answers))
    return examples


def _names(drawn: Random, n: int) -> list[str]:
    """Names of five letters, of which no two start alike."""
    first = drawn.sample(ascii_uppercase, n)
    return [letter + "".join(drawn.choices(ascii_uppercase, k=LETTERS - 1)) for letter in first]


VARIABLE_TRACKING = Task(
    NAME, "contextual", make, "the variables that have a value through a chain of assignments"
)
