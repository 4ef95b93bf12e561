"""How long a document a model reads."""

from __future__ import annotations

from typing import Any

LENGTH = 256
"""Tokens of a document where nobody says otherwise and the model reads as many."""


def context_of(model: Any) -> int | None:
    """The longest document in tokens, as the model's configuration says; None where it does not.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model.
    """
    own = getattr(model, "cfg", None) or getattr(model, "config", None)
    found = getattr(own, "n_ctx", None) or getattr(own, "max_position_embeddings", None)
    return None if found is None else int(found)


def default_length(model: Any) -> int:
    """``LENGTH`` tokens, or the model's context where that is shorter."""
    return min(LENGTH, context_of(model) or LENGTH)
