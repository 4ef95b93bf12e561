"""Rotation of slot pairs, each key head by frequencies of its own."""

from __future__ import annotations

from typing import Any

import torch

from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.plan import Plan, one_row

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary frequencies that do not depend on the length of the text."""


def model_frequencies(config: Any, rotary_dim: int, layer: int) -> tuple[torch.Tensor, float]:
    """The model's own frequencies, float32 radians per token, and the factor of cos and sin.

    Args:
        config: the configuration.
        rotary_dim: how many dimensions of a full head rotate.
        layer: number of the layer, for families with one kind of rotation per kind of layer.

    Raises:
        SlimFolderError: a kind of rotation that is not a list of constants.
    """
    rope, layer_type = config.rope_parameters, None
    if "rope_type" not in rope and "rope_theta" not in rope:
        layer_type = config.layer_types[layer]
        rope = rope[layer_type]
    kind = rope.get("rope_type", "default")
    if kind not in STATIC:
        raise SlimFolderError(
            f"rope_type={kind!r} changes with the length of a text: gainlens-vllm turns by "
            f"{', '.join(STATIC)}"
        )
    if kind == "default":
        steps = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float()
        return 1.0 / (float(rope["rope_theta"]) ** (steps / rotary_dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make = ROPE_INIT_FUNCTIONS[kind]
    found, factor = make(config, torch.device("cpu"), layer_type=layer_type)
    return found.float(), float(factor)


def slot_frequencies(
    plan: Plan, config: Any, rotary_dim: int, layer: int
) -> tuple[torch.Tensor, float] | None:
    """Frequencies of a layer's slots, float32 ``[kv_head, slot]``, and the factor of cos and sin.

    On the CPU. One row serves all heads. None if nothing turns. Arguments and errors as for
    ``model_frequencies``.
    """
    columns = plan.layers[layer].columns
    if columns is None:
        return None
    with torch.device("cpu"):  # vLLM builds models where tensors are made on the GPU
        own, factor = model_frequencies(config, rotary_dim, layer)
        table = own if plan.table is None else plan.table.float()
        if plan.layers[layer].still:
            table = torch.cat([table, torch.zeros(1)])
        return table[one_row(columns)], factor


def rotate(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> torch.Tensor:
    """Turn each slot pair (s, s + width/2) by its frequency times the position, in float32.

    Args:
        x: ``[token, kv_head, query head of the group, width]``.
        positions: ``[token]``.
        frequencies: ``[kv_head or 1, slot]``.
        factor: of cosines and sines.
    """
    angle = positions[:, None, None].float() * frequencies
    cos, sin = (angle.cos() * factor)[:, :, None], (angle.sin() * factor)[:, :, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
