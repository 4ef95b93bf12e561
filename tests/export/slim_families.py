"""Small random models of every family, and masks with a known seed."""

from __future__ import annotations

import torch
import transformers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (configuration, rotary width)
CONFIGS = {
    "llama": (lambda: transformers.LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=True), 16),
    "llama-biased": (lambda: transformers.LlamaConfig(**SMALL, attention_bias=True), 8),
    "llama-3-rope": (lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3), 8),
    "llama-yarn": (lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN), 8),
    "mistral": (lambda: transformers.MistralConfig(**SMALL, sliding_window=6), 8),
    "qwen2": (lambda: transformers.Qwen2Config(**SMALL), 8),
    "qwen3": (lambda: transformers.Qwen3Config(**SMALL, head_dim=16), 16),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(
            **SMALL,
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        16,
    ),
    "neox": (
        lambda: transformers.GPTNeoXConfig(
            **NEOX,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        ),
        4,
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            scale_attn_by_inverse_layer_idx=True,
        ),
        0,
    ),
}


def random_model(name: str):
    """A model whose logits really depend on its keys: wide weights, no zero biases."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name][0]()).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm = "norm" in parameter_name or ".ln_" in parameter_name
            parameter.normal_(0, 0.15)
            if norm and parameter_name.endswith("weight"):
                parameter.add_(1.0)
    return model


def random_keep(shape, rotary_dim, seed=0, ragged=True):
    """A mask of whole pairs in which every head keeps something, heads differing in number."""
    layers, heads, d_head = shape
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(shape, dtype=torch.bool)
    half = rotary_dim // 2
    units = [(i, i + half) for i in range(half)] + [(i,) for i in range(rotary_dim, d_head)]
    for layer in range(layers):
        for head in range(heads):
            most = len(units) - 1
            n = int(torch.randint(1, most + 1, (1,), generator=generator)) if ragged else most // 2
            for unit in torch.randperm(len(units), generator=generator)[:n].tolist():
                keep[layer, head, list(units[unit])] = True
    return keep


def shape_of(model):
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, d_head
