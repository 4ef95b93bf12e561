"""Small random models of every family, and masks with a known seed."""

from __future__ import annotations

from importlib.metadata import version

import torch
import transformers

from gainlens.export.layout import KeyPairs

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
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 5.0],
    "original_max_position_embeddings": 32,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GPT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FALCON = {**GPT, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def falcon(**settings):
    return transformers.FalconConfig(**FALCON, max_position_embeddings=64, **settings)


def mpt(**attention):
    return transformers.MptConfig(
        **GPT, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, attn_config=attention
    )


# name: (configuration, how many dimensions rotate, in half-split pairs unless it says otherwise)
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
    "gemma": (lambda: transformers.GemmaConfig(**SMALL, head_dim=16), 16),
    "gemma2": (
        lambda: transformers.Gemma2Config(
            **SMALL,
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            layer_types=MIXED,
        ),
        16,
    ),
    "granite": (
        lambda: transformers.GraniteConfig(
            **SMALL, attention_multiplier=0.2, residual_multiplier=0.7, embedding_multiplier=3.0
        ),
        8,
    ),
    "starcoder2": (
        lambda: transformers.Starcoder2Config(**SMALL, sliding_window=6, residual_dropout=0.1),
        8,
    ),
    "smollm3": (
        lambda: transformers.SmolLM3Config(
            **SMALL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=6
        ),
        KeyPairs(8, "half", frozenset({1})),
    ),
    "stablelm": (lambda: transformers.StableLmConfig(**SMALL, use_qkv_bias=True), 2),
    "stablelm-normed": (lambda: transformers.StableLmConfig(**SMALL, qk_layernorm=True), 2),
    "phi": (lambda: transformers.PhiConfig(**SMALL), 4),
    "phi-normed": (lambda: transformers.PhiConfig(**SMALL, qk_layernorm=True), 4),
    "phi3": (lambda: transformers.Phi3Config(**SMALL, sliding_window=6), 8),
    "phi3-longrope": (
        lambda: transformers.Phi3Config(
            **SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=32
        ),
        4,
    ),
    "olmo2": (lambda: transformers.Olmo2Config(**SMALL), 8),
    "ernie": (lambda: transformers.Ernie4_5Config(**SMALL, head_dim=16), KeyPairs(16, "adjacent")),
    "glm": (lambda: transformers.GlmConfig(**SMALL, head_dim=16), KeyPairs(8, "adjacent")),
    "glm4": (lambda: transformers.Glm4Config(**SMALL, head_dim=16), KeyPairs(8, "adjacent")),
    "cohere": (
        lambda: transformers.CohereConfig(**SMALL, logit_scale=1.0),
        KeyPairs(8, "adjacent"),
    ),
    "cohere-normed": (
        lambda: transformers.CohereConfig(**SMALL, logit_scale=1.0, use_qk_norm=True),
        KeyPairs(8, "adjacent"),
    ),
    "cohere2": (
        lambda: transformers.Cohere2Config(
            **SMALL, logit_scale=1.0, sliding_window=6, layer_types=MIXED
        ),
        KeyPairs(8, "adjacent", frozenset({1})),
    ),
    "gptj": (
        lambda: transformers.GPTJConfig(
            **GPT, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, resid_pdrop=0.1
        ),
        KeyPairs(4, "adjacent"),
    ),
    "falcon": (lambda: falcon(), 8),
    "falcon-groups": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), 8),
    "falcon-heads": (lambda: falcon(multi_query=False, parallel_attn=False, bias=True), 8),
    "falcon-alibi": (lambda: falcon(multi_query=False, alibi=True), 0),
    "opt": (
        lambda: transformers.OPTConfig(
            **GPT,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
        ),
        0,
    ),
    "gptneo": (
        lambda: transformers.GPTNeoConfig(
            **GPT,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            max_position_embeddings=64,
            window_size=6,
            attention_types=[[["local", "global", "local"], 1]],
            resid_dropout=0.1,
        ),
        0,
    ),
    "bloom": (
        lambda: transformers.BloomConfig(
            **GPT, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.1
        ),
        0,
    ),
    "mpt": (lambda: mpt(softmax_scale=0.5), 0),
    "mpt-bounded": (lambda: mpt(clip_qkv=0.4), 0),
}
NO_BRIDGE = {
    "phi-normed": "adapter did not declare 'q_norm'",
    "falcon-groups": "split_with_sizes expects split_sizes to sum",
    "falcon-alibi": "logits of the TransformerBridge differ",
}
"""What TransformerLens can't wrap, and what it says; transformers' model can be made slim."""
if version("transformer-lens") < "4":
    NO_BRIDGE |= {
        "cohere": "logits of the TransformerBridge differ",
        "cohere2": "logits of the TransformerBridge differ",
        "cohere-normed": "adapter did not declare 'q_norm'",
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


class MaskedCache(transformers.DynamicCache):
    """Masks the keys of an unmodified model, as an oracle that is not gainlens'.

    In every family keys pass through ``Cache.update`` after all norms and rotations. Falcon repeats
    them there for every query head.
    """

    def __init__(self, keep, config):
        super().__init__(config=config)
        self.keep = keep

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keep = self.keep[layer_idx]
        keep = keep.repeat_interleave(key_states.shape[1] // len(keep), 0)
        return super().update(key_states * keep[:, None], value_states, layer_idx, *args, **kwargs)


def random_keep(shape, rotary, seed=0, ragged=True):
    """A mask of whole pairs in which every head keeps something, heads differing in number."""
    layers, heads, d_head = shape
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(shape, dtype=torch.bool)
    rotary_dim, adjacent = rotary, False
    if isinstance(rotary, KeyPairs):  # layers that do not rotate keep whole pairs as well
        rotary_dim, adjacent = rotary.rotary_dim, rotary.pairing == "adjacent"
    half = rotary_dim // 2
    pairs = [(2 * i, 2 * i + 1) if adjacent else (i, i + half) for i in range(half)]
    units = pairs + [(i,) for i in range(rotary_dim, d_head)]
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
    if isinstance(config, transformers.FalconConfig) and not config.new_decoder_architecture:
        heads = 1 if config.multi_query else config.num_attention_heads
    elif isinstance(config, transformers.FalconConfig):
        heads = config.num_kv_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, d_head
