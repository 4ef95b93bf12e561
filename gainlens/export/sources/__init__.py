"""Sources of weights for ``slim``: a transformers model, a bridge or a ``HookedTransformer``.

Each kind is one file that reads the weights under Hugging Face names, without changing the model.
"""

from __future__ import annotations

from typing import Any

from gainlens.errors import InputError
from gainlens.export.adapters import check_no_adapters, without_adapters
from gainlens.export.sources.base import Source

__all__ = ["Source", "open_source"]


def open_source(model: Any) -> Source:
    """Read access to the weights of ``model``, for all three kinds.

    Raises:
        InputError: the model is of none of these kinds.
        UnsupportedModelError: this family or option cannot be made slim, or adapters cannot be
            merged.
    """
    from gainlens.export.sources.bridge import BridgeSource
    from gainlens.export.sources.hooked import HookedSource
    from gainlens.export.sources.huggingface import HuggingFaceSource

    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if hasattr(model, "hook_dict") and hasattr(model, "blocks"):
        check_no_adapters(model, "made slim as a TransformerBridge")
        return BridgeSource(model) if hasattr(model, "original_model") else HookedSource(model)
    if hasattr(model, "get_input_embeddings") and hasattr(model, "config"):
        return HuggingFaceSource(without_adapters(model))
    raise InputError(
        f"model={type(model).__name__}: expected a TransformerBridge, a HookedTransformer or a "
        "transformers model (gainlens.load_model makes one)"
    )
