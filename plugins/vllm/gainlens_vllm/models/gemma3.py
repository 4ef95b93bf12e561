"""Gemma 3 (text): vLLM's model around ``SlimAttention``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3MLP,
    Gemma3Model,
)
from vllm.model_executor.models.utils import (
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from gainlens_vllm.attention import SlimAttention
from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.models.loading import without_index

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class SlimGemma3DecoderLayer(Gemma3DecoderLayer):
    """The parent's forward pass, over parts with another attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's builds the full attention
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.self_attn = SlimAttention(
            config, f"{prefix}.self_attn", vllm_config.cache_config, quant_config
        )
        self.mlp = Gemma3MLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_activation,
            quant_config,
            prefix=f"{prefix}.mlp",
        )
        for name in NORMS:
            setattr(self, name, GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))


@support_torch_compile
class SlimGemma3Model(Gemma3Model):
    """The parent's forward pass, over slim layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: SlimGemma3DecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        scale = torch.tensor(float(config.hidden_size) ** 0.5)
        self.register_buffer("normalizer", scale, persistent=False)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )


class SlimGemma3ForCausalLM(Gemma3ForCausalLM):
    """vLLM's Gemma 3 with thin keys."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        if vllm_config.model_config.dtype == torch.float16:
            raise SlimFolderError("dtype=float16: Gemma 3 overflows, use bfloat16 or float32")
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = SlimGemma3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=config.final_logit_softcapping
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a slim folder; errors as for ``without_index``."""
        return super().load_weights(without_index(weights, self.config))
