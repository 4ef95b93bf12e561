"""vLLM's Triton attention for keys and values of unequal widths, with widths of its own per layer.

vLLM's backend keeps the width of values in one place for the whole process. Here each layer's
cache specification and its tensors say it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn_diffkv import (
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
)


class ThinKeysBuilder(TritonAttentionDiffKVMetadataBuilder):
    """Makes the scratch space for the value width of its group of layers."""

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        TritonAttentionDiffKVBackend.set_head_size_v(kv_cache_spec.head_size_v)
        super().__init__(kv_cache_spec, *args, **kwargs)


class ThinKeysImpl(TritonAttentionDiffKVImpl):
    """Attends with the value width of the layer that calls."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the parent's; the width is that of ``value``."""
        TritonAttentionDiffKVBackend.set_head_size_v(value.shape[-1])
        return super().forward(layer, query, key, value, *args, **kwargs)


class ThinKeysBackend(TritonAttentionDiffKVBackend):
    """The backend of layers whose keys are physically thinner than their values."""

    @staticmethod
    def get_impl_cls() -> type[ThinKeysImpl]:
        """What attends."""
        return ThinKeysImpl

    @staticmethod
    def get_builder_cls() -> type[ThinKeysBuilder]:
        """What prepares a step."""
        return ThinKeysBuilder
