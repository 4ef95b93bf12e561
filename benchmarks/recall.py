"""Text to heal on whose second half says stretches of its first half again, in another order.

What a cut of the keys loses first is looking things up in the context, and ordinary text asks for
it rarely. Here the intact model is sure of most tokens of the second half, because it finds them in
the first; a cut model that is healed on its distribution has to find them as well.
"""

from __future__ import annotations

import torch

from gainlens.data.texts import Texts

NAME = "recall"
"""The name of this text among a training text's domains."""
STRETCH = (8, 64)
"""Fewest and most tokens of a stretch."""


def recall_text(text: Texts, documents: int, seed: int) -> Texts:
    """Documents made of rows of ``text`` with 512 tokens or more, spread over all of it.

    Each keeps the length of its row: the first half of the row, then its stretches, shuffled.
    """
    long = [i for i, length in enumerate(text.lengths) if length >= 512]
    every = max(1, len(long) // documents)
    rows = [text.rows[i] for i in long[::every][:documents]]
    dice = torch.Generator().manual_seed(seed)
    return Texts(
        tuple(said_again(row, dice) for row in rows),
        (NAME,) * len(rows),
        tuple(range(len(rows))),
    )


def said_again(row: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """The first half of a row, ``[pos]``, and its stretches in random order."""
    half = row[: len(row) // 2]
    parts = []
    start = 0
    while start < len(half):
        size = int(torch.randint(STRETCH[0], STRETCH[1] + 1, (), generator=dice))
        parts.append(half[start : start + size])
        start += size
    order = torch.randperm(len(parts), generator=dice).tolist()
    return torch.cat([half, *(parts[i] for i in order)])
