"""A ``TransformerBridge`` as a source: the Hugging Face model inside, under its own names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float

from gainlens.errors import UnsupportedModelError
from gainlens.export.sources.lens import LensSource
from gainlens.export.weights import AttentionWeights
from gainlens.model.wrapping import architecture_of

INSIDE = "._original_component"


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
        self.tensors: dict[str, torch.Tensor] = {}
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            plain = name.replace(INSIDE, "")
            # An alias of the bridge may read like the original's own name; that one comes first.
            if plain not in self.tensors or INSIDE in name:
                self.tensors[plain] = parameter.detach()

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        path = self.family.attention.format(layer) + "."
        tensors = {n[len(path) :]: t for n, t in self.tensors.items() if n.startswith(path)}
        weights = self.family.read(tensors, self.config)
        if self.family.key_site in ("query_key_value", "c_attn"):
            # A bridge splits a joint matrix into parts of its own, and runs (and trains) those.
            part = self.model.blocks[layer].attn
            q, k, v = (getattr(part, f"W_{n}").detach().transpose(1, 2) for n in "QKV")
            biases = {
                f"{n}_bias": getattr(part, f"b_{n.upper()}").detach().reshape(old.shape)
                for n in "qkv"
                if (old := getattr(weights, f"{n}_bias")) is not None
            }
            weights = replace(weights, q=q, k=k, v=v, **biases)
        return weights

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        for name in wanted:
            yield name, self.tensors[name]
