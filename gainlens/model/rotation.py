"""Rotary rotation with frequencies measured on a model, for models that fire no hook after it."""

from __future__ import annotations

import torch
from jaxtyping import Float

from gainlens.model.families import Pairing


def rotate(
    x: Float[torch.Tensor, "batch pos head d_head"],
    frequencies: Float[torch.Tensor, " rotary_pair"],
    pairing: Pairing,
    *,
    inverse: bool = False,
) -> Float[torch.Tensor, "batch pos head d_head"]:
    """Turn each rotary pair by its frequency (radians per token) times the position.

    Positions are 0, 1, … along ``pos``: no left padding and no cache offset.

    Args:
        x: keys or queries before (or with ``inverse`` after) the rotation.
        frequencies: one per rotary pair; the rotary width is twice their number.
        pairing: ``half`` or ``adjacent``; ``none`` returns ``x``.
        inverse: turn backwards.
    """
    width = 2 * frequencies.numel()
    if pairing == "none" or width == 0:
        return x
    angle = torch.outer(
        torch.arange(x.shape[1], device=x.device, dtype=torch.float64),
        frequencies.to(device=x.device, dtype=torch.float64),
    )
    cos, sin = (f(angle).to(torch.float32)[None, :, None, :] for f in (torch.cos, torch.sin))
    if inverse:
        sin = -sin
    turned = x[..., :width].float()
    if pairing == "half":
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)
