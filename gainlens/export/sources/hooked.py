"""A ``HookedTransformer`` as a source: its weights mapped back to a Hugging Face layout.

Folded layer norms are fine: their factors become ones, and a bias that folding moved into the
unembedding is moved back into the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from jaxtyping import Float
from transformers.activations import ACT2FN

from gainlens.errors import UnsupportedModelError
from gainlens.export.families import FAMILIES
from gainlens.export.sources.lens import LensSource
from gainlens.model.attention_layouts import lens_weights
from gainlens.model.attention_weights import AttentionWeights

Getter = Callable[[Any, int], torch.Tensor]
"""A tensor of a HookedTransformer, given the model and a layer number."""


def _at(path: str, transpose: bool = False) -> Getter:
    def get(model: Any, layer: int) -> torch.Tensor:
        found: Any = model
        for part in path.replace("{}", str(layer)).split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        tensor: torch.Tensor = found.detach()
        return tensor.T if transpose else tensor

    return get


def _norm(path: str, part: str) -> Getter:
    """A norm's factor or bias: ones and zeros where it is folded away."""

    def get(model: Any, layer: int) -> torch.Tensor:
        try:
            return _at(f"{path}.{part}")(model, layer)
        except AttributeError:
            like: torch.Tensor = model.W_E
            size = (model.cfg.d_model,)
            return like.new_ones(size) if part == "w" else like.new_zeros(size)

    return get


def _final_bias(model: Any, layer: int) -> torch.Tensor:
    """The final norm's bias; see ``_unembedding``."""
    bias = _norm("ln_final", "b")(model, layer)
    return torch.full_like(bias, 1 / len(bias)) if _output_bias(model) is not None else bias


def _unembedding(model: Any, layer: int) -> torch.Tensor:
    """The output matrix ``[vocab, d_model]``, with an output bias that folding left in it.

    A folded norm's output x has mean zero, so with b the output bias, 1 a row of ones and n the
    width, (W + c 1)(x + 1/n) = W x + b for c = b - W 1/n.
    """
    weight = _at("unembed.W_U", True)(model, layer)
    rest = _output_bias(model)
    return weight if rest is None else weight + (rest - weight.mean(1))[:, None]


def _output_bias(model: Any) -> torch.Tensor | None:
    """The unembedding's bias, or None where it is zero."""
    bias: torch.Tensor = model.unembed.b_U.detach()
    if not bool(bias.any()):
        return None
    if hasattr(model.ln_final, "w"):
        raise UnsupportedModelError(
            "this HookedTransformer has an output bias, which no Hugging Face layout holds unless "
            "it comes from a folded layer norm"
        )
    return bias


_LLAMA: dict[str, Getter] = {
    "model.embed_tokens.weight": _at("embed.W_E"),
    "model.layers.{}.input_layernorm.weight": _norm("blocks.{}.ln1", "w"),
    "model.layers.{}.post_attention_layernorm.weight": _norm("blocks.{}.ln2", "w"),
    "model.layers.{}.mlp.gate_proj.weight": _at("blocks.{}.mlp.W_gate", True),
    "model.layers.{}.mlp.up_proj.weight": _at("blocks.{}.mlp.W_in", True),
    "model.layers.{}.mlp.down_proj.weight": _at("blocks.{}.mlp.W_out", True),
    "model.norm.weight": _norm("ln_final", "w"),
    "lm_head.weight": _at("unembed.W_U", True),
}

NAMES: dict[str, dict[str, Getter]] = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA,
    "GPTNeoX": {
        "gpt_neox.embed_in.weight": _at("embed.W_E"),
        "gpt_neox.layers.{}.input_layernorm.weight": _norm("blocks.{}.ln1", "w"),
        "gpt_neox.layers.{}.input_layernorm.bias": _norm("blocks.{}.ln1", "b"),
        "gpt_neox.layers.{}.post_attention_layernorm.weight": _norm("blocks.{}.ln2", "w"),
        "gpt_neox.layers.{}.post_attention_layernorm.bias": _norm("blocks.{}.ln2", "b"),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": _at("blocks.{}.mlp.W_in", True),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": _at("blocks.{}.mlp.b_in"),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": _at("blocks.{}.mlp.W_out", True),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": _at("blocks.{}.mlp.b_out"),
        "gpt_neox.final_layer_norm.weight": _norm("ln_final", "w"),
        "gpt_neox.final_layer_norm.bias": _final_bias,
        "lm_head.weight": _unembedding,
        "embed_out.weight": _unembedding,
    },
    "GPT2": {
        "transformer.wte.weight": _at("embed.W_E"),
        "transformer.wpe.weight": _at("pos_embed.W_pos"),
        "transformer.h.{}.ln_1.weight": _norm("blocks.{}.ln1", "w"),
        "transformer.h.{}.ln_1.bias": _norm("blocks.{}.ln1", "b"),
        "transformer.h.{}.ln_2.weight": _norm("blocks.{}.ln2", "w"),
        "transformer.h.{}.ln_2.bias": _norm("blocks.{}.ln2", "b"),
        "transformer.h.{}.mlp.c_fc.weight": _at("blocks.{}.mlp.W_in"),
        "transformer.h.{}.mlp.c_fc.bias": _at("blocks.{}.mlp.b_in"),
        "transformer.h.{}.mlp.c_proj.weight": _at("blocks.{}.mlp.W_out"),
        "transformer.h.{}.mlp.c_proj.bias": _at("blocks.{}.mlp.b_out"),
        "transformer.ln_f.weight": _norm("ln_final", "w"),
        "transformer.ln_f.bias": _final_bias,
        "lm_head.weight": _unembedding,
    },
}


class HookedSource(LensSource):
    """See ``Source``."""

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        architecture = str(getattr(cfg, "original_architecture", None) or "unknown")
        family = FAMILIES.get(architecture)
        if family is None or family.name not in NAMES:
            known = [a for a, f in FAMILIES.items() if f.name in NAMES]
            raise UnsupportedModelError(
                f"a HookedTransformer of architecture {architecture!r} can't be made slim: known "
                f"are {', '.join(known)}"
            )
        super().__init__(model, _config(cfg, family.config_class), architecture)
        self.config.tie_word_embeddings = bool(torch.equal(model.W_E.T, model.W_U))
        self._biased = {
            name: any(bool(_bias(block.attn, name).any()) for block in model.blocks)
            for name in "QKVO"
        }

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        part = self.model.blocks[layer].attn
        q, k, v = lens_weights(part)
        biases = {f"{n.lower()}_bias": _bias(part, n) if self._biased[n] else None for n in "QKVO"}
        norms = {}
        if self.family.key_norm(self.config) is not None:
            n_kv = len(k)
            norms = {f"{n}_norm": getattr(part, f"{n}_norm").w.detach() for n in "qk"}
            norms = {name: w.expand(n_kv, -1) for name, w in norms.items()}
        return AttentionWeights(q, k, v, part.W_O.detach().permute(2, 0, 1), **biases, **norms)

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        table = NAMES[self.family.name]
        for name in wanted:
            parts = name.split(".")
            layer = next((int(p) for p in parts if p.isdigit()), 0)
            generic = ".".join("{}" if p.isdigit() else p for p in parts)
            if generic not in table:
                raise UnsupportedModelError(
                    f"{self.architecture}: this HookedTransformer has nothing for {name!r}"
                )
            try:
                yield name, table[generic](self.model, layer)
            except AttributeError as error:
                raise UnsupportedModelError(
                    f"{self.architecture}: this HookedTransformer has nothing for {name!r} "
                    f"({error})"
                ) from None


def _ungrouped(attention: Any, name: str) -> torch.Tensor:
    found = getattr(attention, f"_{name}", None)  # key heads not repeated
    tensor: torch.Tensor = getattr(attention, name) if found is None else found
    return tensor.detach()


def _bias(attention: Any, name: str) -> torch.Tensor:
    return _ungrouped(attention, f"b_{name}")


def _config(cfg: Any, config_class: str) -> Any:
    """A Hugging Face configuration for a ``HookedTransformerConfig``.

    Raises:
        UnsupportedModelError: rotary scaling or an activation that isn't mapped.
    """
    if cfg.act_fn not in ACT2FN:
        raise UnsupportedModelError(
            f"this HookedTransformer's MLPs use act_fn={cfg.act_fn!r}, which no Hugging Face "
            "layout has"
        )
    common: dict[str, Any] = {
        "vocab_size": int(cfg.d_vocab),
        "hidden_size": int(cfg.d_model),
        "num_hidden_layers": int(cfg.n_layers),
        "num_attention_heads": int(cfg.n_heads),
        "intermediate_size": int(cfg.d_mlp),
        "max_position_embeddings": int(cfg.n_ctx),
        "hidden_act": str(cfg.act_fn),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    cls: Any = getattr(transformers, config_class)
    if config_class == "GPT2Config":
        return cls(
            vocab_size=common["vocab_size"],
            n_embd=common["hidden_size"],
            n_layer=common["num_hidden_layers"],
            n_head=common["num_attention_heads"],
            n_inner=common["intermediate_size"],
            n_positions=common["max_position_embeddings"],
            activation_function=common["hidden_act"],
            layer_norm_epsilon=float(cfg.eps),
            scale_attn_by_inverse_layer_idx=bool(cfg.scale_attn_by_inverse_layer_idx),
            bos_token_id=None,
            eos_token_id=None,
        )
    rope = _rope(cfg)
    if config_class == "GPTNeoXConfig":
        rope["partial_rotary_factor"] = cfg.rotary_dim / cfg.d_head
        return cls(
            **common,
            rope_parameters=rope,
            layer_norm_eps=float(cfg.eps),
            use_parallel_residual=bool(cfg.parallel_attn_mlp),
        )
    windows: dict[str, Any] = {}
    if config_class == "MistralConfig":
        windows["sliding_window"] = int(cfg.window_size) if cfg.use_local_attn else None
    return cls(
        **common,
        **windows,
        num_key_value_heads=int(cfg.n_key_value_heads or cfg.n_heads),
        head_dim=int(cfg.d_head),
        rms_norm_eps=float(cfg.eps),
        rope_parameters=rope,
    )


def _rope(cfg: Any) -> dict[str, Any]:
    if getattr(cfg, "use_yarn_rope", False) or getattr(cfg, "use_dynamic_ntk_rope", False):
        raise UnsupportedModelError(
            "this HookedTransformer scales its rotary frequencies by YaRN or dynamic NTK, which "
            "is not mapped to Hugging Face: make the Hugging Face model slim instead"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(cfg.rotary_base)}
    if getattr(cfg, "use_NTK_by_parts_rope", False):
        rope.update(
            rope_type="llama3",
            factor=float(cfg.NTK_by_parts_factor),
            low_freq_factor=float(cfg.NTK_by_parts_low_freq_factor),
            high_freq_factor=float(cfg.NTK_by_parts_high_freq_factor),
            original_max_position_embeddings=int(cfg.NTK_original_ctx_len),
        )
    elif float(getattr(cfg, "rotary_scaling_factor", 1.0) or 1.0) != 1.0:
        rope.update(rope_type="linear", factor=float(cfg.rotary_scaling_factor))
    return rope
