"""The table of model families that can be made slim. A new family is one row.

A row says where a transformers model keeps its attention, how to read its weights, and what its
attention does besides: scale, norms, rotary width. Everything else of the model (embeddings,
norms, MLPs, masks, generation) is the family's own class, used as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float

from gainlens.export.weights import AttentionWeights

Tensors = Mapping[str, torch.Tensor]
"""A layer's attention tensors by their name inside the attention module."""

KeySite = Literal["k_proj", "k_norm_by_pos", "k_norm_by_head", "query_key_value", "c_attn"]
"""Which module's output carries the keys, and how; used to mask the original in parity checks."""


@dataclass(frozen=True)
class SlimFamily:
    """One row.

    Attributes:
        name: what the slim classes are called after.
        config_class, model_class: the family's classes in transformers.
        attention: path of layer ``{}``'s attention module.
        read: an attention module's tensors as ``AttentionWeights``.
        key_site: where the original's keys can be masked.
        output: name of the output projection inside the attention module.
        refuse: why a configuration can't be made slim, or None.
        norm: whether a norm over the head sits on queries and keys.
        norm_offset: what is added to that norm's weights; they are stored without it, as the
            original stores them, since near one half precision would round them away.
        sliding: whether layers may attend to a window only.
        resid_dropout: whether dropout follows the output projection inside the module.
        llama: whether the same weights, with biases, make a ``LlamaForCausalLM``.
    """

    name: str
    config_class: str
    model_class: str
    attention: str
    read: Callable[[Tensors, Any], AttentionWeights]
    key_site: KeySite
    output: str
    refuse: Callable[[Any], str | None]
    norm: bool = False
    norm_offset: float = 0.0
    sliding: bool = False
    resid_dropout: bool = False
    llama: bool = False

    def d_head(self, config: Any) -> int:
        """Width of a full head."""
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    def n_kv_heads(self, config: Any) -> int:
        """Key heads per layer."""
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def rotary_dim(self, config: Any) -> int:
        """How many leading dimensions of a head rotate."""
        rope = getattr(config, "rope_parameters", None)
        if not rope:
            return 0
        share = rope.get("partial_rotary_factor") if self.name == "GPTNeoX" else 1.0
        width = int(self.d_head(config) * (1.0 if share is None else share))
        return width + width % 2  # an odd width gets a frequency more than fit its pairs

    def scaling(self, config: Any, layer: int) -> float:
        """What a query-key product is multiplied by, that of the full head."""
        if self.name == "Gemma3":
            special: float = float(config.query_pre_attn_scalar) ** -0.5
            return special
        scale: float = float(self.d_head(config)) ** -0.5
        if self.name == "GPT2":
            scale = scale if config.scale_attn_weights else 1.0
            scale /= float(layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        return scale

    def window(self, config: Any, layer: int) -> int | None:
        """The layer's sliding window, or None where it sees everything before."""
        if not self.sliding:
            return None
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        window = getattr(config, "sliding_window", None)
        return None if window is None else int(window)

    def dropout(self, config: Any) -> float:
        """Dropout on attention weights while training."""
        share: Any = getattr(config, "attn_pdrop", None)
        return float(getattr(config, "attention_dropout", 0.0) if share is None else share)


def _heads(
    weight: Float[torch.Tensor, "rows *rest"], n: int
) -> Float[torch.Tensor, "head d *rest"]:
    return weight.reshape(n, -1, *weight.shape[1:])


def _read_separate(tensors: Tensors, config: Any, norm_offset: float | None) -> AttentionWeights:
    n, kv = int(config.num_attention_heads), int(config.num_key_value_heads)
    q, k, v = (
        _heads(tensors[f"{name}_proj.weight"], heads)
        for name, heads in (("q", n), ("k", kv), ("v", kv))
    )
    out = tensors["o_proj.weight"]
    biases = {
        f"{name}_bias": _heads(tensors[f"{name}_proj.bias"], heads)
        for name, heads in (("q", n), ("k", kv), ("v", kv))
        if f"{name}_proj.bias" in tensors
    }
    norms = {}
    if norm_offset is not None:
        for name in ("q_norm", "k_norm"):
            factor = tensors[f"{name}.weight"]
            exact = factor if norm_offset == 0 else factor.float() + norm_offset
            norms[name] = exact.expand(kv, -1)
    return AttentionWeights(
        q=q,
        k=k,
        v=v,
        o=out.reshape(out.shape[0], n, -1),
        o_bias=tensors.get("o_proj.bias"),
        **biases,
        **norms,
    )


def read_llama(tensors: Tensors, config: Any) -> AttentionWeights:
    """Llama, Mistral, Qwen2: separate projections."""
    return _read_separate(tensors, config, None)


def read_qwen3(tensors: Tensors, config: Any) -> AttentionWeights:
    """Separate projections and a norm that multiplies by its weight."""
    return _read_separate(tensors, config, 0.0)


def read_gemma3(tensors: Tensors, config: Any) -> AttentionWeights:
    """Separate projections and a norm that multiplies by one plus its weight."""
    return _read_separate(tensors, config, 1.0)


def read_neox(tensors: Tensors, config: Any) -> AttentionWeights:
    """One matrix, each head's query, key and value rows together."""
    n = int(config.num_attention_heads)
    fused, out = tensors["query_key_value.weight"], tensors["dense.weight"]
    q, k, v = fused.reshape(n, 3, -1, fused.shape[1]).unbind(1)
    bias = tensors.get("query_key_value.bias")
    parts = (None,) * 3 if bias is None else bias.reshape(n, 3, -1).unbind(1)
    o = out.reshape(out.shape[0], n, -1)
    q_bias, k_bias, v_bias = parts
    return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, tensors.get("dense.bias"))


def read_gpt2(tensors: Tensors, config: Any) -> AttentionWeights:
    """One matrix ``[in, out]``: all query columns, then keys, then values."""
    n = int(config.num_attention_heads)
    parts = [_heads(w, n) for w in tensors["c_attn.weight"].T.chunk(3)]
    q_bias, k_bias, v_bias = (_heads(b, n) for b in tensors["c_attn.bias"].chunk(3))
    q, k, v = parts
    out = tensors["c_proj.weight"].T
    o = out.reshape(out.shape[0], n, -1)
    return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, tensors["c_proj.bias"])


def _nothing(config: Any) -> str | None:
    return None


def _gemma3(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention logits are soft-capped, which the sliced attention doesn't do"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    return None


def _gpt2(config: Any) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention, whose keys come from another model"
    return None


_LLAMA = "model.layers.{}.self_attn"

FAMILIES: dict[str, SlimFamily] = {
    "LlamaForCausalLM": SlimFamily(
        "Llama", "LlamaConfig", "LlamaForCausalLM", _LLAMA, read_llama, "k_proj", "o_proj",
        _nothing, llama=True,
    ),
    "MistralForCausalLM": SlimFamily(
        "Mistral", "MistralConfig", "MistralForCausalLM", _LLAMA, read_llama, "k_proj", "o_proj",
        _nothing, sliding=True, llama=True,
    ),
    "Qwen2ForCausalLM": SlimFamily(
        "Qwen2", "Qwen2Config", "Qwen2ForCausalLM", _LLAMA, read_llama, "k_proj", "o_proj",
        _nothing, sliding=True, llama=True,
    ),
    "Qwen3ForCausalLM": SlimFamily(
        "Qwen3", "Qwen3Config", "Qwen3ForCausalLM", _LLAMA, read_qwen3, "k_norm_by_pos", "o_proj",
        _nothing, norm=True, sliding=True,
    ),
    "Gemma3ForCausalLM": SlimFamily(
        "Gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", _LLAMA, read_gemma3, "k_norm_by_head",
        "o_proj", _gemma3, norm=True, norm_offset=1.0, sliding=True,
    ),
    "GPTNeoXForCausalLM": SlimFamily(
        "GPTNeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", "gpt_neox.layers.{}.attention",
        read_neox, "query_key_value", "dense", _nothing,
    ),
    "GPT2LMHeadModel": SlimFamily(
        "GPT2", "GPT2Config", "GPT2LMHeadModel", "transformer.h.{}.attn", read_gpt2, "c_attn",
        "c_proj", _gpt2, resid_dropout=True,
    ),
}  # fmt: skip
