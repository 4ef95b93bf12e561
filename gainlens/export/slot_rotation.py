"""The rotation of a slim model whose slots have frequencies of their own.

Attention modules pick columns of one table of angles. Where a plan names frequencies, the table
holds those in the place of the family's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from gainlens.errors import InputError
from gainlens.model.families import Pairing


class SlotRotary(nn.Module):
    """Cosines and sines of a table of frequencies, called as a family's own rotary embedding.

    Args:
        own: the family's; its scales of cosines and sines stay.
        frequencies: radians per token.

    Attributes:
        attention_scaling: of cosines and sines.
    """

    def __init__(self, own: nn.Module, frequencies: Float[torch.Tensor, " column"]) -> None:
        super().__init__()
        self.attention_scaling = float(getattr(own, "attention_scaling", 1.0))
        ending = "_attention_scaling"  # of the layers of a kind, where kinds rotate differently
        self._scalings = {
            name.removesuffix(ending): float(value)
            for name, value in vars(own).items()
            if name.endswith(ending)
        }
        # Numbers and no buffer: a cast of the model must not round them.
        self._frequencies = [float(f) for f in frequencies]

    @property
    def inv_freq(self) -> Float[torch.Tensor, " column"]:
        """The table, float32 on the CPU."""
        return torch.tensor(self._frequencies, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def forward(
        self,
        x: Float[torch.Tensor, "*rest"],
        position_ids: Int[torch.Tensor, "batch pos"],
        layer_type: str | None = None,
    ) -> tuple[Float[torch.Tensor, "batch pos _"], Float[torch.Tensor, "batch pos _"]]:
        """Each column twice, as in the half-split layout."""
        table = torch.tensor(self._frequencies, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            angle = position_ids[..., None].float() * table
            scale = self._scalings.get(layer_type or "", self.attention_scaling)
            cos, sin = (f(angle) * scale for f in (torch.cos, torch.sin))
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return cos.to(x.dtype), sin.to(x.dtype)


def usual_frequencies(rotary_dim: int, base: float = 1e4) -> Float[torch.Tensor, " column"]:
    """``base ** (-2 i / rotary_dim)`` radians per token of pair i, float64."""
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu")
    return base ** (-pairs / rotary_dim)


def frequency_table(
    frequencies: Float[torch.Tensor, "layer kv_head pair"],
    pairs: list[Int[np.ndarray, "kv_head _"]],
) -> tuple[Float[torch.Tensor, " column"], list[Int[np.ndarray, "kv_head _"]]]:
    """Every frequency that is used, once, and the column of each slot of each layer.

    Args:
        frequencies: of the pairs of each head.
        pairs: which pair each slot is, per layer.
    """
    used = [f.gather(1, torch.from_numpy(p)) for f, p in zip(frequencies, pairs, strict=True)]
    table = torch.unique(torch.cat([u.flatten() for u in used]))
    return table, [torch.searchsorted(table, u).numpy() for u in used]


def check_frequencies(
    frequencies: Float[torch.Tensor, "..."], shape: tuple[int, int, int]
) -> Float[torch.Tensor, "layer kv_head pair"]:
    """Float64 frequencies of every pair of every head, from an array of that shape or wider.

    Args:
        frequencies: ``[layer, kv_head, pair]``; an axis of length 1 serves all.
        shape: ``(n_layers, n_kv_heads, d_head)`` of the plan.

    Raises:
        InputError: another shape, or a frequency that is negative or not finite.
    """
    found = frequencies.detach().cpu().double()
    wanted, sizes = (shape[0], shape[1], shape[2] // 2), tuple(found.shape)
    if (
        len(sizes) != 3
        or sizes[2] != wanted[2]
        or any(n not in (1, w) for n, w in zip(sizes[:2], wanted[:2], strict=True))
    ):
        raise InputError(f"frequencies have shape {sizes}: expected {wanted}")
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise InputError(
            f"frequencies run from {float(found.min()):.4g} to {float(found.max()):.4g}: expected "
            "finite radians per token of 0 or above"
        )
    return found.expand(wanted).clone()


def collapsed(frequencies: Float[torch.Tensor, "layer kv_head pair"] | None) -> Any:
    """As nested lists for JSON; an axis along which nothing changes has length 1."""
    if frequencies is None:
        return None
    for axis in (0, 1):
        first = frequencies.narrow(axis, 0, 1)
        if bool((frequencies == first).all()):
            frequencies = first
    return frequencies.tolist()


def expanded(values: Any) -> Float[torch.Tensor, "..."] | None:
    """The tensor of what ``collapsed`` made.

    Raises:
        TypeError, ValueError: it made something else.
    """
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def turned_by(
    x: Float[torch.Tensor, "batch pos head d_head"],
    frequencies: Float[torch.Tensor, "kv_head pair"],
    pairing: Pairing = "half",
) -> Float[torch.Tensor, "batch pos head d_head"]:
    """Pairs of each head turned by its frequencies at positions 0, 1, …, in float64."""
    wide = frequencies.to(x.device).repeat_interleave(x.shape[2] // len(frequencies), 0)
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angle = positions[:, None, None] * wide
    cos, sin = angle.cos(), angle.sin()
    axis, half = (-1, (-1, 2)) if pairing == "adjacent" else (-2, (2, -1))
    a, b = x.double().reshape(*x.shape[:-1], *half).unbind(axis)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], axis)
    return turned.flatten(-2).to(x.dtype)
