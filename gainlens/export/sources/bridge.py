"""A ``TransformerBridge`` as a source: the Hugging Face model inside, under its own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float

from gainlens.errors import UnsupportedModelError
from gainlens.export.sources.lens import LensSource
from gainlens.model.attention_layouts import (
    bridge_weights,
    check_same_layers,
    layer_tensors,
    plain_tensors,
)
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.stored_weights import StoredWeights
from gainlens.model.wrapping import architecture_of


class BridgeSource(LensSource):
    """See ``Source``."""

    def __init__(self, model: Any) -> None:
        if getattr(model, "compatibility_mode", False):
            raise UnsupportedModelError(
                "this bridge is in compatibility mode, whose folded weights no Hugging Face "
                "layout holds: make it slim before enable_compatibility_mode()"
            )
        inner = model.original_model
        super().__init__(model, inner.config, architecture_of(inner))
        self.tensors = StoredWeights(inner)
        check_same_layers(
            plain_tensors(inner), self.family.layout, self.n_layers, self.architecture
        )

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        if self.tensors.elsewhere:  # never trained, so the parts of a joint matrix are the matrix's
            layout = self.family.layout
            return layout.read(layer_tensors(self.tensors, layout, layer), self.config)
        return bridge_weights(self.model, self.family.layout, self.config, layer, self.tensors)

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        for name in wanted:
            yield name, self.tensors[name]
