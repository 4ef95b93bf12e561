"""Check a user's tokens against a model's vocabulary and context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int

from gainlens.data.batches import TOKENS_PER_BATCH, Tokens, batches
from gainlens.model.context import context_of


def model_batches(
    model: Any, tokens: Tokens, tokens_per_batch: int = TOKENS_PER_BATCH
) -> Iterator[Int[torch.Tensor, "document pos"]]:
    """``gainlens.data.batches.batches`` with the model's vocabulary and context.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: see ``gainlens.data.batches.Tokens``.
        tokens_per_batch: upper bound; a longer document is a batch of its own.

    Raises:
        InputError: see ``gainlens.data.batches.batches``.
    """
    return batches(tokens, int(model.cfg.d_vocab), tokens_per_batch, context_of(model))


def model_documents(model: Any, tokens: Tokens) -> list[Int[torch.Tensor, " _"]]:
    """All documents as a list of 1-D tensors, checked as ``model_batches`` does."""
    return [row for batch in model_batches(model, tokens) for row in batch]
