"""The table of model families. A row says what a family's slim attention does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFIX = "gainlens_"
"""Start of every ``model_type`` of a slim folder."""


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: as in the architecture, ``Slim{name}ForCausalLM``.
        config_class: its configuration in transformers.
        model: ``module:class`` under ``gainlens_vllm.models``.
        attention: path of layer ``{}``'s attention in the names of weights.
        norm: whether a norm over the full head acts on queries and keys.
        norm_offset: added to the weights of that norm.
        sliding: whether layers may have a sliding window.
    """

    name: str
    config_class: str
    model: str
    attention: str = "model.layers.{}.self_attn"
    norm: bool = False
    norm_offset: float = 0.0
    sliding: bool = False

    @property
    def architecture(self) -> str:
        """The entry of ``architectures`` in ``config.json``."""
        return f"Slim{self.name}ForCausalLM"

    def d_head(self, config: Any) -> int:
        """Width of a full head."""
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    def n_kv_heads(self, config: Any) -> int:
        """Key heads per layer, on all ranks together."""
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def shape(self, config: Any) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``, as in a plan."""
        return int(config.num_hidden_layers), self.n_kv_heads(config), self.d_head(config)

    def rotary_dim(self, config: Any) -> int:
        """How many dimensions of a full head rotate."""
        return self.d_head(config) if getattr(config, "rope_parameters", None) else 0

    def scaling(self, config: Any, layer: int) -> float:
        """Softmax scale: that of the full head."""
        if self.name == "Gemma3":
            special: float = float(config.query_pre_attn_scalar) ** -0.5
            return special
        scale: float = float(self.d_head(config)) ** -0.5
        if self.name == "GPT2":
            scale = scale if config.scale_attn_weights else 1.0
            scale /= float(layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        return scale

    def window(self, config: Any, layer: int) -> int | None:
        """Sliding window of a layer, or None."""
        if not self.sliding:
            return None
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        window = getattr(config, "sliding_window", None)
        return None if window is None else int(window)


FAMILIES = (
    Family("Llama", "LlamaConfig", "llama:SlimLlamaForCausalLM"),
    Family("Mistral", "MistralConfig", "llama:SlimLlamaForCausalLM", sliding=True),
    Family("Qwen2", "Qwen2Config", "llama:SlimLlamaForCausalLM", sliding=True),
    Family("Qwen3", "Qwen3Config", "llama:SlimLlamaForCausalLM", norm=True, sliding=True),
    Family(
        "Gemma3", "Gemma3TextConfig", "gemma3:SlimGemma3ForCausalLM", norm=True, norm_offset=1.0,
        sliding=True,
    ),
    Family("GPT2", "GPT2Config", "gpt2:SlimGPT2ForCausalLM", attention="transformer.h.{}.attn"),
)  # fmt: skip
NO_ROW = "it has no row for this family yet"
REFUSED = {
    "GPTNeoX": ("GPTNeoXConfig", "vLLM 0.32 has no GPT-NeoX"),
    **{
        name: (f"{name}Config", NO_ROW)
        for name in (
            "Gemma", "Gemma2", "Granite", "Starcoder2", "SmolLM3", "StableLm", "Phi", "Phi3",
            "Olmo2", "Ernie4_5", "Glm", "Glm4", "Cohere", "Cohere2", "GPTJ", "Falcon", "OPT",
            "GPTNeo", "Bloom", "Mpt",
        )
    },
}  # fmt: skip
"""Families that gainlens writes and this plug-in doesn't serve: configuration and reason."""
