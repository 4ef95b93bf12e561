"""GPT-2: vLLM's model around ``SlimAttention``; keys don't turn."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.gpt2 import GPT2MLP, GPT2Block, GPT2LMHeadModel, GPT2Model
from vllm.model_executor.models.utils import (
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from gainlens_vllm.attention import SlimAttention
from gainlens_vllm.models.loading import without_index


class SlimGPT2Block(GPT2Block):
    """The parent's forward pass, over parts with another attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's builds the full attention
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.attn = SlimGPT2Attention(
            config, f"{prefix}.attn", vllm_config.cache_config, quant_config
        )
        inner = 4 * width if config.n_inner is None else config.n_inner
        self.mlp = GPT2MLP(inner, config, quant_config, prefix=f"{prefix}.mlp")


class SlimGPT2Attention(SlimAttention):
    """Called without positions."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """``[token, d_model]`` in and out."""
        return super().forward(None, hidden_states)


@support_torch_compile
class SlimGPT2Model(GPT2Model):
    """The parent's forward pass, over slim layers."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            f".attn.{name}_proj": (".attn.qkv_proj", name) for name in ("q", "k", "v")
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's refuses scales per layer
        config = vllm_config.model_config.hf_config
        self.config, self.embed_dim = config, config.hidden_size
        self.wte = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.wte",
        )
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.start_layer, self.end_layer, self.h = make_layers(
            config.num_hidden_layers,
            lambda prefix: SlimGPT2Block(vllm_config, prefix),
            prefix=f"{prefix}.h",
        )
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )


class SlimGPT2ForCausalLM(GPT2LMHeadModel):
    """vLLM's GPT-2 with thin keys."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.transformer = SlimGPT2Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a slim folder; errors as for ``without_index``."""
        return super().load_weights(without_index(weights, self.config))
