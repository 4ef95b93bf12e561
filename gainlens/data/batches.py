"""Turn the tokens a caller passes into batches of equal length, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int

from gainlens.errors import InputError

Tokens = torch.Tensor | Sequence[Any] | Iterable[Any]
"""``[document, position]``, a sequence of 1-D documents of any length, or an iterable of batches
``[document, position]``."""

TOKENS_PER_BATCH = 1024


def batches(
    tokens: Tokens,
    vocabulary: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    context: int | None = None,
) -> Iterator[Int[torch.Tensor, "document pos"]]:
    """Yield ``[document, position]`` batches of at most ``tokens_per_batch`` tokens.

    Each batch holds documents of one length, in their original order, so padding never enters a
    statistic.

    Args:
        tokens: see ``Tokens``.
        vocabulary: number of token ids of the model.
        tokens_per_batch: upper bound; a longer document is a batch of its own.
        context: the model's maximum number of tokens, if known.

    Returns:
        Long tensors, for any integer input type.

    Raises:
        InputError: there is no document, a document has fewer than two tokens or more than the
            context, an id is outside the vocabulary, or the values are not integers.
    """
    n_documents = 0
    for group in _equal_lengths(tokens):
        group = _checked(group, vocabulary, n_documents, context)
        n_documents += len(group)
        rows = max(1, tokens_per_batch // group.shape[1])
        for start in range(0, len(group), rows):
            yield group[start : start + rows]
    if n_documents == 0:
        raise InputError("tokens holds no document: expected at least one, of two or more tokens")


def as_documents(
    tokens: Tokens, vocabulary: int, context: int | None = None
) -> list[Int[torch.Tensor, " _"]]:
    """All documents as a list of 1-D tensors, checked as ``batches`` does."""
    return [row for batch in batches(tokens, vocabulary, context=context) for row in batch]


def _equal_lengths(tokens: Tokens) -> Iterator[torch.Tensor]:
    if isinstance(tokens, torch.Tensor):
        if tokens.ndim != 2:
            raise InputError(
                f"tokens has shape {tuple(tokens.shape)}: expected [document, position]"
            )
        if len(tokens):
            yield tokens
        return
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise InputError(
            f"tokens={type(tokens).__name__}: expected a long tensor [document, position], a "
            "sequence of documents, or an iterable of batches (gainlens.load_tokens makes one)"
        )
    waiting: list[torch.Tensor] = []
    for item in tokens:
        try:
            tensor = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"tokens holds a {type(item).__name__}: expected token ids (a tensor or a list of "
                "integers per document); load_tokens makes them from texts"
            ) from None
        if tensor.ndim == 2:
            if waiting:
                yield torch.stack(waiting)
                waiting = []
            yield tensor
        elif tensor.ndim == 1:
            if waiting and len(waiting[0]) != len(tensor):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(tensor)
        else:
            raise InputError(
                f"tokens holds an item of shape {tuple(tensor.shape)}: expected 1 or 2"
            )
    if waiting:
        yield torch.stack(waiting)


def _checked(
    group: torch.Tensor, vocabulary: int, first: int, context: int | None
) -> Int[torch.Tensor, "document pos"]:
    if group.dtype.is_floating_point or group.dtype.is_complex or group.dtype == torch.bool:
        raise InputError(f"tokens has dtype {group.dtype}: expected integers")
    group = group.long()  # embeddings don't accept int16, and torch can't compare uint16
    if group.shape[1] < 2:
        raise InputError(
            f"document {first} of tokens has {group.shape[1]} token(s): expected at least 2"
        )
    if context is not None and group.shape[1] > context:
        raise InputError(
            f"document {first} of tokens has {group.shape[1]} tokens: this model reads at most "
            f"{context}"
        )
    if len(group) and (int(group.min()) < 0 or int(group.max()) >= vocabulary):
        raise InputError(
            f"tokens holds ids from {int(group.min())} to {int(group.max())}: this model's "
            f"vocabulary is 0 to {vocabulary - 1}"
        )
    return group
