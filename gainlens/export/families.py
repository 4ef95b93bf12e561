"""The table of model families that can be made slim. A new family is one row.

A row describes the attention of a transformers model apart from its projections: scale, norms,
rotary width. ``gainlens.model.attention_layouts`` says where the projections are. Everything else
(embeddings, norms, MLPs, masks, generation) uses the class of the family unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gainlens.model.attention_layouts import LAYOUTS, AttentionLayout

KeySite = Literal["k_proj", "k_norm_by_pos", "k_norm_by_head", "query_key_value", "c_attn"]
"""Which module's output carries the keys, and how; used to mask the original in parity checks."""


@dataclass(frozen=True)
class SlimFamily:
    """One row.

    Attributes:
        name: name of the family in the names of the slim classes.
        config_class, model_class: the family's classes in transformers.
        key_site: where the original's keys can be masked.
        refuse: reason why a configuration cannot be made slim, or None.
        norm: whether a norm over the head acts on queries and keys.
        sliding: whether layers may have a sliding window.
        resid_dropout: whether dropout follows the output projection inside the module.
        llama: whether the same weights, with biases, make a ``LlamaForCausalLM``.
    """

    name: str
    config_class: str
    model_class: str
    key_site: KeySite
    refuse: Callable[[Any], str | None]
    norm: bool = False
    sliding: bool = False
    resid_dropout: bool = False
    llama: bool = False

    @property
    def layout(self) -> AttentionLayout:
        """Where the family keeps its attention weights."""
        return LAYOUTS[self.model_class]

    @property
    def attention(self) -> str:
        """Path of layer ``{}``'s attention module."""
        return self.layout.attention

    @property
    def output(self) -> str:
        """Name of the output projection inside the attention module."""
        return self.layout.output

    @property
    def norm_offset(self) -> float:
        """Offset that is added to the weights of the norms on queries and keys. They are stored
        without it, as in the original, because half precision would lose small values near one."""
        return self.layout.norm_offset if self.norm else 0.0

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
        """Softmax scale of the full head."""
        if self.name == "Gemma3":
            special: float = float(config.query_pre_attn_scalar) ** -0.5
            return special
        scale: float = float(self.d_head(config)) ** -0.5
        if self.name == "GPT2":
            scale = scale if config.scale_attn_weights else 1.0
            scale /= float(layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        return scale

    def window(self, config: Any, layer: int) -> int | None:
        """Sliding window of the layer, or None for full attention."""
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


FAMILIES: dict[str, SlimFamily] = {
    "LlamaForCausalLM": SlimFamily(
        "Llama", "LlamaConfig", "LlamaForCausalLM", "k_proj", _nothing, llama=True,
    ),
    "MistralForCausalLM": SlimFamily(
        "Mistral", "MistralConfig", "MistralForCausalLM", "k_proj", _nothing, sliding=True,
        llama=True,
    ),
    "Qwen2ForCausalLM": SlimFamily(
        "Qwen2", "Qwen2Config", "Qwen2ForCausalLM", "k_proj", _nothing, sliding=True, llama=True,
    ),
    "Qwen3ForCausalLM": SlimFamily(
        "Qwen3", "Qwen3Config", "Qwen3ForCausalLM", "k_norm_by_pos", _nothing, norm=True,
        sliding=True,
    ),
    "Gemma3ForCausalLM": SlimFamily(
        "Gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", "k_norm_by_head", _gemma3, norm=True,
        sliding=True,
    ),
    "GPTNeoXForCausalLM": SlimFamily(
        "GPTNeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", "query_key_value", _nothing,
    ),
    "GPT2LMHeadModel": SlimFamily(
        "GPT2", "GPT2Config", "GPT2LMHeadModel", "c_attn", _gpt2, resid_dropout=True,
    ),
}  # fmt: skip
