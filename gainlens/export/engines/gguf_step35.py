"""Values wider than keys: llama.cpp's architecture ``step35``, as dense layers of full attention.

It is the only dense grouped-query architecture of llama.cpp that supports unequal widths. Its rows
are in the half-split order of transformers, and ``rope_freqs`` divides the frequencies of layers
without a window. llama.cpp asserts properties of the original models, such as one layer with a
window. Settings alone satisfy them: an extra last block, which is only for drafting and may be
missing, has the window, and there are no experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gainlens.errors import FileFormatError
from gainlens.export.engines import gguf_file
from gainlens.export.engines.gguf_file import GgufFile, gguf_name
from gainlens.export.engines.stock import folded_state, longrope_factors

ARCH = "step35"
BUILDS = "llama.cpp of June 2026 or later (xllamacpp 2026.6.9538)"
NOTES = (
    f"values wider than keys are kept as architecture {ARCH}, which {BUILDS} loads",
    "that architecture stores the output matrix apart from the embedding (a tied one twice), and "
    "does not shift a full context (start with a context that is long enough)",
    "on CUDA and Metal llama.cpp has no fused attention for keys narrower than values",
    "keys can be cached in a quantised type where their width is a multiple of 32",
)


def add_step35(writer: Any, slim: Any, precision: str) -> None:
    """Settings and weights of a slim model; see ``NOTES``."""
    config, first = slim.config, slim.model.layers[0].self_attn
    theta, factors = longrope_factors(slim)
    n_layers, width = int(config.num_hidden_layers), int(first.head_dim)
    gguf_file.add_common_settings(writer, ARCH, config, precision)
    writer.add_block_count(n_layers + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_sliding_window(int(config.max_position_embeddings))
    writer.add_sliding_window_pattern([False] * n_layers + [True])
    writer.add_expert_feed_forward_length(0)
    writer.add_rope_dimension_count(2 * width)  # halved when it is read
    writer.add_rope_dimension_count_swa(width)
    writer.add_rope_freq_base(theta)
    writer.add_key_length(width)
    writer.add_value_length(int(first.value_dim))
    writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    for name, tensor in folded_state(slim).items():
        gguf_file.add_weight(writer, gguf_name(name), tensor.numpy(), precision)


def step35_from_gguf(file: Path) -> Any:
    """A float32 ``LlamaForCausalLM`` that computes what llama.cpp computes from the file.

    Its heads are as wide as the values. Keys and queries are padded with zero rotary pairs, and
    queries are multiplied by the ratio of the two softmax scales.

    Raises:
        FileFormatError: the settings make llama.cpp compute something else.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    found = GgufFile(file)
    n_layers = int(found.setting("block_count")) - int(found.setting("nextn_predict_layers"))
    width = int(found.setting("attention.key_length"))
    values = int(found.setting("attention.value_length"))
    windows = list(found.setting("attention.sliding_window_pattern"))
    rotary = int(found.setting("rope.dimension_count")) // 2
    if any(windows[:n_layers]) or not all(windows[n_layers:]) or rotary != width:
        raise FileFormatError(
            f"{file}: layers with windows {windows} and rotary width {rotary} of {width}: "
            "expected full attention and whole heads"
        )
    full = max(width, values)
    config = LlamaConfig(
        **found.common_settings(),
        num_hidden_layers=n_layers,
        head_dim=full,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    state = {}
    for name in model.state_dict():
        weight = torch.from_numpy(found.weights[gguf_name(name)].copy())
        part = gguf_name(name).split(".")[-2]
        if part in ("attn_q", "attn_k"):
            halves = weight.reshape(-1, 2, width // 2, weight.shape[1])
            wide = halves.new_zeros(len(halves), 2, full // 2, weight.shape[1])
            wide[:, :, : width // 2] = halves * ((full / width) ** 0.5 if part == "attn_q" else 1)
            weight = wide.flatten(0, 2)
        elif part == "attn_v":
            wide = weight.new_zeros(len(weight) // values, full, weight.shape[1])
            wide[:, :values] = weight.reshape(-1, values, weight.shape[1])
            weight = wide.flatten(0, 1)
        elif part == "attn_output":
            wide = weight.new_zeros(len(weight), weight.shape[1] // values, full)
            wide[..., :values] = weight.reshape(len(weight), -1, values)
            weight = wide.flatten(1)
        state[name] = weight
    model.load_state_dict(state, strict=True)
    frequencies = np.zeros(full // 2)
    frequencies[: width // 2] = found.frequencies(rotary)
    model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies.astype(np.float32))
    return model
