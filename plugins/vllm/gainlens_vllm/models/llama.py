"""Llama, Mistral, Qwen2 and Qwen3: one decoder layer, which differs in the attention alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from gainlens_vllm.attention import SlimAttention
from gainlens_vllm.models.loading import without_index


class SlimDecoderLayer(LlamaDecoderLayer):
    """vLLM's layer of a Llama around ``SlimAttention``."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=SlimAttention)


class SlimLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with thin keys."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SlimDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a slim folder; errors as for ``without_index``."""
        return super().load_weights(without_index(weights, self.config))
