"""Represent a text by hashes of overlapping pieces, so that equal passages give equal hashes.

Winnowing (Schleimer, Wilkerson and Aiken 2003): in every window of ``window`` consecutive pieces,
the piece with the smallest hash is kept. Two texts that share ``gram + window - 1`` consecutive
items have at least one hash in common, wherever the passage is.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Int, UInt64

BITS = 48
"""Bits per hash: two texts of 10,000 pieces share one by chance once in three million."""
TOKEN_GRAM, TOKEN_WINDOW = 8, 16
"""In token ids: any 23 consecutive common tokens are found."""
LETTER_GRAM, LETTER_WINDOW = 32, 32
"""In letters and digits: any 63 consecutive common ones (about 13 words) are found."""

_NO_LETTERS = re.compile(r"[\W_]+")


def token_pieces(ids: Int[np.ndarray, " pos"]) -> UInt64[np.ndarray, " piece"]:
    """Distinct pieces of token ids; empty if there are fewer than ``TOKEN_GRAM`` ids."""
    return _winnowed(ids.astype(np.uint64), TOKEN_GRAM, TOKEN_WINDOW, salt=1)


def letter_pieces(text: str) -> UInt64[np.ndarray, " piece"]:
    """Distinct pieces of the letters and digits of a text, ignoring case.

    White space, punctuation and the tokenizer make no difference. The result is empty if there are
    fewer than ``LETTER_GRAM`` letters.
    """
    letters = _NO_LETTERS.sub("", text.casefold())
    codes = np.frombuffer(letters.encode("utf-32-le", "replace"), "<u4")
    return _winnowed(codes.astype(np.uint64), LETTER_GRAM, LETTER_WINDOW, salt=2)


def _winnowed(items: np.ndarray, gram: int, window: int, salt: int) -> np.ndarray:
    """Winnowed hashes. Both lengths are built by doubling, so they must be powers of two."""
    if len(items) < gram:
        return np.empty(0, np.uint64)
    hashes = _mixed(items + np.uint64(salt << 40))
    base, size = 0x9E3779B97F4A7C15, 1
    while size < gram:
        hashes = hashes[:-size] * np.uint64(base) + hashes[size:]
        base, size = base * base % 2**64, 2 * size
    least, size = _mixed(hashes) >> np.uint64(64 - BITS), 1
    while size < window and len(least) > size:
        least = np.minimum(least[:-size], least[size:])
        size *= 2
    return np.unique(least)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hash in which every output bit depends on every input bit (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
