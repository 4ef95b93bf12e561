"""The table of model families that can be made slim. A new family is one row.

A row describes the attention of a transformers model apart from its projections: scale, norms,
rotary width (see ``SlimFamily``). Everything else (embeddings, norms, MLPs, masks, generation) uses
the class of the family unchanged.
"""

from __future__ import annotations

from typing import Any

from gainlens.export.family import (
    KeyNorm,
    SlimFamily,
    share_of_head,
    sliding,
    usual_scale,
)

__all__ = ["FAMILIES", "KeyNorm", "SlimFamily"]

BIDIRECTIONAL = "its attention is bidirectional, so no key cache can be kept"


def _causal(config: Any) -> str | None:
    return BIDIRECTIONAL if getattr(config, "use_bidirectional_attention", False) else None


def _gpt2(config: Any) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention, whose keys come from another model"
    return None


def _gptj(config: Any) -> str | None:
    return None if config.rotary_dim else "rotary_dim=0: its own code rotates by the model's width"


def _norm(config: Any) -> KeyNorm:
    return KeyNorm()


def _gemma3_norm(config: Any) -> KeyNorm:
    return KeyNorm(shape="by_head")


def _olmo2_norm(config: Any) -> KeyNorm:
    return KeyNorm(over="heads", own=True, shape="flat")


def _cohere_norm(config: Any) -> KeyNorm | None:
    return KeyNorm(centred=True, own=True, eps="layer_norm_eps") if config.use_qk_norm else None


def _stablelm_norm(config: Any) -> KeyNorm | None:
    found = KeyNorm(centred=True, own=True, eps="layer_norm_eps", shape="by_head")
    return found if config.qk_layernorm else None


def _phi_norm(config: Any) -> KeyNorm | None:
    found = KeyNorm(centred=True, bias=True, eps="layer_norm_eps", shape="by_head")
    return found if config.qk_layernorm else None


def _query_scalar(config: Any, layer: int, d_head: int) -> float:
    scale: float = float(config.query_pre_attn_scalar) ** -0.5
    return scale


def _multiplier(config: Any, layer: int, d_head: int) -> float:
    return float(config.attention_multiplier)


def _one(config: Any, layer: int, d_head: int) -> float:
    return 1.0


def _gpt2_scale(config: Any, layer: int, d_head: int) -> float:
    scale = usual_scale(config, layer, d_head) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _mpt_scale(config: Any, layer: int, d_head: int) -> float:
    own = config.attn_config.softmax_scale
    return usual_scale(config, layer, d_head) if own is None else float(own)


def _softcap(config: Any) -> float | None:
    found = getattr(config, "attn_logit_softcapping", None)
    return None if found is None else float(found)


def _smollm3_turns(config: Any, layer: int) -> bool:
    return bool(config.no_rope_layers[layer])


def _sliding_turns(config: Any, layer: int) -> bool:
    return sliding(config, layer) is not None


def _rotary_dim(config: Any, d_head: int) -> int:
    return int(config.rotary_dim)


def _falcon_rotary(config: Any, d_head: int) -> int:
    return 0 if config.alibi else d_head


def _falcon_dropout(config: Any) -> float:
    return float(config.attention_dropout) if config.alibi else 0.0  # its own code has it so


def _mpt_dropout(config: Any) -> float:
    return float(config.attn_config.attn_pdrop)


def _clip(config: Any) -> float | None:
    found = config.attn_config.clip_qkv
    return float(found) if found else None


def _local(config: Any, layer: int) -> int | None:
    return int(config.window_size) if config.attention_layers[layer] == "local" else None


def _row(name: str, model: str = "ForCausalLM", config: str = "Config", **axes: Any) -> SlimFamily:
    return SlimFamily(name, f"{name}{config}", f"{name}{model}", **axes)


_ROWS = (
    _row("Llama", llama=True),
    _row("Mistral", window=sliding, llama=True),
    _row("Qwen2", window=sliding, llama=True),
    _row("Qwen3", key_norm=_norm, window=sliding),
    _row(
        "Gemma3", config="TextConfig", refuse=_causal, key_norm=_gemma3_norm, scale=_query_scalar,
        window=sliding,
    ),
    _row("GPTNeoX", rotary=share_of_head),
    _row(
        "GPT2", model="LMHeadModel", refuse=_gpt2, rotary=None, scale=_gpt2_scale,
        output_dropout="resid_pdrop",
    ),
    _row("Gemma", refuse=_causal),
    _row("Gemma2", refuse=_causal, scale=_query_scalar, softcap=_softcap, window=sliding),
    _row("Granite", scale=_multiplier),
    _row("Starcoder2", window=sliding, output_dropout="residual_dropout"),
    _row("SmolLM3", turns=_smollm3_turns, window=sliding),
    _row("StableLm", key_norm=_stablelm_norm, rotary=share_of_head),
    _row("Phi", key_norm=_phi_norm, rotary=share_of_head),
    _row("Phi3", rotary=share_of_head, window=sliding),
    _row("Olmo2", key_norm=_olmo2_norm),
    _row("Ernie4_5"),
    _row("Glm", rotary=share_of_head),
    _row("Glm4", rotary=share_of_head),
    _row("Cohere", key_norm=_cohere_norm, angles="neighbours"),
    _row("Cohere2", turns=_sliding_turns, angles="neighbours", window=sliding),
    _row(
        "GPTJ", refuse=_gptj, rotary=_rotary_dim, angles="positions", output_dropout="resid_pdrop",
    ),
    _row("Falcon", rotary=_falcon_rotary, dropout=_falcon_dropout),
    _row("OPT", rotary=None),
    _row(
        "GPTNeo", rotary=None, scale=_one, own_window=_local, output_dropout="resid_dropout",
    ),
    _row(
        "Bloom", rotary=None, alibi=True, output_dropout="hidden_dropout", adds_residual=True,
    ),
    _row(
        "Mpt", rotary=None, alibi=True, scale=_mpt_scale, dropout=_mpt_dropout, clip=_clip,
        whole_masks=True,
    ),
)  # fmt: skip
FAMILIES: dict[str, SlimFamily] = {row.model_class: row for row in _ROWS}
