"""Values as wide as keys: llama.cpp's architecture ``llama``.

It rotates adjacent rows, so query and key rows are interleaved. It divides each frequency by
``rope_freqs``. The converter of llama.cpp silently drops the longrope factors of a checkpoint, so
gainlens writes the file itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gainlens.export.engines import gguf_file
from gainlens.export.engines.gguf_file import GgufFile, gguf_name
from gainlens.export.engines.stock import longrope_factors, stock_llama

ARCH = "llama"


def add_llama(writer: Any, slim: Any, precision: str) -> None:
    """Settings and weights of a slim model."""
    stock = stock_llama(slim)
    theta, factors = longrope_factors(slim)
    config, width = stock.config, int(stock.config.head_dim)
    gguf_file.add_common_settings(writer, ARCH, config, precision)
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(theta)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in stock.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs, array = gguf_name(name), tensor.numpy()
        if n := heads.get(theirs.split(".")[-2]):
            halves = array.reshape(n, 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        gguf_file.add_weight(writer, theirs, array, precision)


def llama_from_gguf(file: Path) -> Any:
    """A float32 ``LlamaForCausalLM`` from a GGUF file of architecture llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = GgufFile(file)
    weights = found.weights
    config = LlamaConfig(
        **found.common_settings(),
        num_hidden_layers=int(found.setting("block_count")),
        head_dim=int(found.setting("attention.key_length")),
        attention_bias="blk.0.attn_q.bias" in weights,
        mlp_bias="blk.0.ffn_up.bias" in weights,
        tie_word_embeddings="output.weight" not in weights,
    )
    model = LlamaForCausalLM(config).eval()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name in model.state_dict():
        theirs = gguf_name(name)
        if theirs not in weights:
            theirs = "token_embd.weight"  # a tied output
        array = weights[theirs]
        if n := heads.get(theirs.split(".")[-2]):
            pairs = array.reshape(n, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        state[name] = torch.from_numpy(array.copy())
    model.load_state_dict(state, strict=True)
    frequencies = found.frequencies(int(found.setting("rope.dimension_count")))
    model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies.astype(np.float32))
    return model
