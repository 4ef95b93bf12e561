"""The rotation that turns a model's own frequencies into those of a plan's slots, in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from gainlens.model.hooks import Hook


class SlotTurns:
    """Turns queries and keys by what the slots' frequencies add to the model's own.

    Rotations of one pair commute, so it does not matter whether the model has rotated yet.

    Args:
        frequencies: of the plan, float64 radians per token ``[layer, kv_head, rotary_pair]``.
        own: the model's, ``[rotary_pair]``.
    """

    def __init__(
        self,
        frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"],
        own: Float[torch.Tensor, " rotary_pair"],
    ) -> None:
        self._added = frequencies - own.detach().cpu().double()
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, x: Float[torch.Tensor, "batch pos head d_head"], layer: int
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """Turn half-split pairs at positions 0, 1, …, in float32 or wider; the dtype stays."""
        cos, sin = (t.to(x.device) for t in self._table(layer, x.shape[1]))
        if x.shape[2] != cos.shape[1]:
            cos, sin = (t.repeat_interleave(x.shape[2] // t.shape[1], 1) for t in (cos, sin))
        a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def hooks(self) -> list[Hook]:
        """The same as hooks on the projected queries and keys of a TransformerLens model."""

        def at(x: torch.Tensor, hook: Any, *, layer: int) -> torch.Tensor:
            return self(x, layer)

        return [
            (f"blocks.{layer}.attn.hook_{letter}", partial(at, layer=layer))
            for layer in range(len(self._added))
            for letter in "qk"
        ]

    def _table(self, layer: int, n_pos: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[pos, kv_head, pair]``; layers that agree share them."""
        if not self._tables or len(self._tables[0][0]) < n_pos:
            places = torch.arange(n_pos, dtype=torch.float64)[:, None, None]
            self._tables = []
            for number, added in enumerate(self._added):
                if number and torch.equal(added, self._added[number - 1]):
                    self._tables.append(self._tables[-1])
                else:
                    angle = places * added
                    self._tables.append((angle.cos().float(), angle.sin().float()))
        cos, sin = self._tables[layer]
        return cos[:n_pos], sin[:n_pos]
