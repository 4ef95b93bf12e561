"""Small Llamas whose dead rotary pairs are known, and text drawn from the models themselves.

Text that a model wrote is text that it predicts best: any real damage raises its loss. What is
dead, by ``kind``:

- ``shared``: the same pairs in every layer and head have almost no key;
- ``per_head``: other pairs in each;
- ``gauge``: as ``per_head``, but the dead keys are made 50 times as loud as the live ones and
  their queries quieter by more, so that a look at keys alone finds them loudest;
- ``constant``: slow pairs whose key is a large bias, the same at every position, which the
  softmax ignores: loud keys, loud queries, no effect.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ("shared", "per_head", "gauge", "constant")
LAYERS, HEADS, KV, D = 2, 4, 2, 16
PAIRS = D // 2
DEAD = 2
"""Dead pairs per head: a quarter."""
VOCAB = 48


def planted_llama(kind: str, seed: int = 0):
    """(Hugging Face model, keep mask ``[layer, kv_head, d_head]`` of the live dimensions)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=D,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        attention_bias=True,
        # Steep enough that the slowest pairs hardly turn within a prompt.
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(LAYERS, KV, D, dtype=torch.bool)
    same = torch.randperm(PAIRS, generator=generator)[:DEAD]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Sharp attention and a peaked output: live pairs matter.
                scale = {"q_proj": 0.35, "k_proj": 0.35, "v_proj": 0.5, "o_proj": 0.5}
                own = next((s for key, s in scale.items() if key in name), 0.2)
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (1.0 if "embed" in name or "lm_head" in name else own))
            elif name.endswith("bias"):
                parameter.zero_()
        model.lm_head.weight.mul_(0.5)
        for layer, block in enumerate(model.model.layers):
            attention = block.self_attn
            for head in range(KV):
                if kind in ("per_head", "gauge"):
                    pairs = torch.randperm(PAIRS, generator=generator)[:DEAD]
                elif kind == "constant":
                    pairs = torch.arange(PAIRS - DEAD, PAIRS)
                else:
                    pairs = same
                dims = torch.cat([pairs, pairs + PAIRS])
                keep[layer, head, dims] = False
                k_rows = head * D + dims
                group = HEADS // KV
                q_rows = torch.cat([(head * group + g) * D + dims for g in range(group)])
                if kind == "gauge":
                    attention.k_proj.weight[k_rows] *= 50.0
                    attention.q_proj.weight[q_rows] *= 1e-6
                elif kind == "constant":
                    attention.k_proj.weight[k_rows] = 0.0
                    attention.k_proj.bias[k_rows] = 4.0
                else:
                    attention.k_proj.weight[k_rows] *= 1e-5
    return model, keep


def written_by(model, rows: int, length: int, seed: int) -> torch.Tensor:
    """Text drawn from the model's own distribution, token by token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, 1), generator=generator)
    with torch.inference_mode():
        while tokens.shape[1] < length:
            shares = model(tokens).logits[:, -1].float().softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    return tokens


@lru_cache(maxsize=None)
def planted(kind: str, seed: int = 0):
    """(bridge, keep mask, calibration text, validation text); shared between tests."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model, keep = planted_llama(kind, seed)
    calibration, validation = (written_by(model, 16, 40, s) for s in (1, 2))
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    return bridge, keep, calibration, validation
