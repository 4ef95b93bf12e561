"""What ``slim`` reads from: a Hugging Face model, a ``TransformerBridge``, a ``HookedTransformer``.

Each kind is one file that gives the weights under Hugging Face names, without changing the model.
"""

from __future__ import annotations

from typing import Any

from gainlens.errors import InputError
from gainlens.export.adapters import check_no_adapters, without_adapters
from gainlens.export.sources.base import Source

__all__ = ["Source", "open_source"]


def open_source(model: Any) -> Source:
    """The weights of ``model``, whichever of the three kinds it is.

    Raises:
        InputError: neither of them.
        UnsupportedModelError: a family, or an option of one, that can't be made slim; adapters
            that can't be merged.
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
