"""Hashes that identify texts, documents and tensors.

A text has one hash over all of its documents, independent of batching. To test whether two texts
share documents, see ``gainlens.data.overlap``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Int


class TextHasher:
    """Fingerprint of a text, independent of batching."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, batch: Int[torch.Tensor, "document pos"]) -> None:
        """Add documents in order."""
        for row in batch.detach().to("cpu", torch.int64):
            self._hash.update(len(row).to_bytes(8, "little"))
            self._hash.update(row.contiguous().numpy().astype("<i8").tobytes())

    def hexdigest(self) -> str:
        """SHA-256 of the lengths and ids of all documents so far."""
        return self._hash.hexdigest()


def text_fingerprint(
    tokens: Int[torch.Tensor, "document pos"] | Iterable[Int[torch.Tensor, "..."]],
) -> str:
    """Hexadecimal SHA-256 of a text, independent of batching.

    Args:
        tokens: one batch ``[document, pos]``, or an iterable of batches or documents ``[pos]``.

    Example:
        >>> rows = torch.tensor([[1, 2], [3, 4]])
        >>> text_fingerprint(rows) == text_fingerprint([rows[0], rows[1:]])
        True
    """
    hasher = TextHasher()
    for part in [tokens] if isinstance(tokens, torch.Tensor) else tokens:
        hasher.update(part if part.ndim == 2 else part[None])
    return hasher.hexdigest()


def tensor_digest(tensors: Iterable[torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of the types, shapes and bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def row_hash(row: torch.Tensor) -> str:
    """SHA-256 of one document's token ids ``[pos]``, the same on every machine."""
    ids = row.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()
