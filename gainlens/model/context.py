"""A model's context length."""

from __future__ import annotations

from typing import Any

LENGTH = 256
"""Default document length in tokens, if the model's context allows it."""


def context_of(model: Any) -> int | None:
    """The maximum document length in tokens from the model's configuration, or None if not given.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model.
    """
    own = getattr(model, "cfg", None) or getattr(model, "config", None)
    names = ("n_ctx", "max_position_embeddings", "max_seq_len")
    found = next((size for name in names if (size := getattr(own, name, None))), None)
    return None if found is None else int(found)


LONGEST = 2048
"""Default length in tokens of the longest calibration, training and judging documents of the
command line, if the model's context allows it."""


def default_length(model: Any) -> int:
    """``LENGTH`` tokens, or the model's context if it is shorter."""
    return min(LENGTH, context_of(model) or LENGTH)
