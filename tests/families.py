"""The shared matrix: one small random model per family. A new family is tested by being listed.

Weights are drawn large, so that attention is far from uniform and a wrong cut shows.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import torch
import transformers

COMMON = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
)
NO_GROUPS = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
GPT = dict(n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=64)

# architecture: (config class, its arguments, pairing, rotary width, fires hook_rot_k, norm on keys)
FAMILIES = {
    "LlamaForCausalLM": ("LlamaConfig", COMMON | {"head_dim": 16}, "half", 16, True, False),
    "MistralForCausalLM": ("MistralConfig", COMMON | {"head_dim": 16}, "half", 16, True, False),
    "Qwen2ForCausalLM": ("Qwen2Config", COMMON, "half", 12, True, False),
    "Qwen3ForCausalLM": ("Qwen3Config", COMMON | {"head_dim": 16}, "half", 16, True, True),
    "GemmaForCausalLM": ("GemmaConfig", COMMON | {"head_dim": 16}, "half", 16, True, False),
    "Gemma2ForCausalLM": ("Gemma2Config", COMMON | {"head_dim": 16}, "half", 16, True, False),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", COMMON | {"head_dim": 16}, "half", 16, True, True),
    "Olmo2ForCausalLM": ("Olmo2Config", COMMON | {"pad_token_id": 0}, "half", 12, True, True),
    "SmolLM3ForCausalLM": ("SmolLM3Config", COMMON | {"pad_token_id": 0}, "half", 12, True, False),
    "StableLmForCausalLM": ("StableLmConfig", COMMON, "half", 4, True, False),
    "PhiForCausalLM": (
        "PhiConfig",
        NO_GROUPS | {"partial_rotary_factor": 0.5},
        "half",
        6,
        True,
        False,
    ),
    "Phi3ForCausalLM": ("Phi3Config", COMMON | {"pad_token_id": 0}, "half", 12, False, False),
    "GPTNeoXForCausalLM": (
        "GPTNeoXConfig",
        NO_GROUPS | {"rotary_pct": 0.5},
        "half",
        6,
        False,
        False,
    ),
    "FalconForCausalLM": (
        "FalconConfig",
        dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            multi_query=True,
        ),
        "half",
        16,
        False,
        False,
    ),
    "GPTJForCausalLM": ("GPTJConfig", GPT | {"rotary_dim": 8}, "adjacent", 8, False, False),
    "CohereForCausalLM": (
        "CohereConfig",
        COMMON | {"pad_token_id": 0},
        "adjacent",
        12,
        True,
        False,
    ),
    "GlmForCausalLM": (
        "GlmConfig",
        COMMON | {"head_dim": 16, "pad_token_id": 0, "partial_rotary_factor": 0.5},
        "adjacent",
        8,
        True,
        False,
    ),
    "Ernie4_5ForCausalLM": (
        "Ernie4_5Config",
        COMMON | {"head_dim": 16},
        "adjacent",
        16,
        True,
        False,
    ),
    "GraniteForCausalLM": (
        "GraniteConfig",
        COMMON | {"attention_multiplier": 0.2},
        "half",
        12,
        True,
        False,
    ),
    "Starcoder2ForCausalLM": ("Starcoder2Config", COMMON, "half", 12, True, False),
    "Cohere2ForCausalLM": (
        "Cohere2Config",
        COMMON | {"pad_token_id": 0},
        "adjacent",
        12,
        True,
        False,
    ),
    "Glm4ForCausalLM": (
        "Glm4Config",
        COMMON | {"head_dim": 16, "pad_token_id": 0, "partial_rotary_factor": 0.5},
        "adjacent",
        8,
        True,
        False,
    ),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        dict(
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
        ),
        "none",
        0,
        False,
        False,
    ),
    "BloomForCausalLM": (
        "BloomConfig",
        dict(hidden_size=48, n_layer=2, n_head=4, vocab_size=64),
        "none",
        0,
        False,
        False,
    ),
    "MptForCausalLM": (
        "MptConfig",
        dict(d_model=48, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=64),
        "none",
        0,
        False,
        False,
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT, "none", 0, False, False),
    "OPTForCausalLM": (
        "OPTConfig",
        dict(
            hidden_size=48,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
        ),
        "none",
        0,
        False,
        False,
    ),
}
# transformer-lens 3.9 turns Cohere's keys with the wrong pairing (its logits differ from Hugging
# Face's by more than half); gainlens must refuse it there: test_sites.py.
MISROTATED = (
    {"CohereForCausalLM", "Cohere2ForCausalLM"} if version("transformer-lens") < "4" else set()
)
ALL_FAMILIES, FAMILIES = FAMILIES, {n: row for n, row in FAMILIES.items() if n not in MISROTATED}
ROTARY = [name for name, row in FAMILIES.items() if row[2] != "none"]
NO_NORM = [name for name in ROTARY if not FAMILIES[name][5]]


def hugging_face(name: str, seed: int = 0):
    """A fresh small model of an architecture with large random attention weights."""
    kind, arguments, *_ = ALL_FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**arguments)
    config.architectures = [name]
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.2 / parameter.std().clamp_min(1e-6))
            elif float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    return model


@cache
def bridge(name: str):
    """The same as a TransformerBridge; shared between tests, which must leave it as it was."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = hugging_face(name)
    return build_bridge_from_module(model, name, hf_config=model.config)


def family_tokens(rows: int = 3, length: int = 12, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 60, (rows, length), generator=generator)
