"""The rotation that turns a model's own frequencies into those of a plan's slots, in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from gainlens.model.families import Pairing
from gainlens.model.hooks import Hook
from gainlens.model.rotation import Turn
from gainlens.model.sites import pair_partners


class SlotTurns:
    """Turns queries and keys by what the slots' frequencies add to the model's own.

    Rotations of one pair commute, so it does not matter whether the model has rotated yet.

    Args:
        frequencies: of the plan, float64 radians per token ``[layer, kv_head, rotary_pair]``.
        own: the model's, ``[layer, rotary_pair]``.
        pairing: how the pairs lie.
    """

    def __init__(
        self,
        frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"],
        own: Float[torch.Tensor, "layer rotary_pair"],
        pairing: Pairing = "half",
    ) -> None:
        self._added = frequencies - own.detach().cpu().double()[:, None]
        d_head = 2 * self._added.shape[-1]
        self._partner = pair_partners(d_head, d_head, pairing)
        self._turns: list[Turn] = []

    def __call__(
        self, x: Float[torch.Tensor, "batch pos head d_head"], layer: int
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """Turn pairs at positions 0, 1, …, in float32 or wider; the dtype stays."""
        turn = self._turn(layer, x.shape[1]).for_heads(x.shape[2])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return turn(wide.transpose(1, 2)).transpose(1, 2).to(x.dtype)

    def hooks(self) -> list[Hook]:
        """The same as hooks on the projected queries and keys of a TransformerLens model."""

        def at(x: torch.Tensor, hook: Any, *, layer: int) -> torch.Tensor:
            return self(x, layer)

        return [
            (f"blocks.{layer}.attn.hook_{letter}", partial(at, layer=layer))
            for layer in range(len(self._added))
            for letter in "qk"
        ]

    def _turn(self, layer: int, n_pos: int) -> Turn:
        """The rotation of a layer ``[kv_head, pos, dim]``; layers that agree share it."""
        if not self._turns or self._turns[0].cos.shape[-2] < n_pos:
            places = torch.arange(n_pos)[None]
            self._turns = []
            for number, added in enumerate(self._added):
                if number and torch.equal(added, self._added[number - 1]):
                    self._turns.append(self._turns[-1])
                else:
                    self._turns.append(Turn.of_frequencies(added[:, None], self._partner, places))
        return self._turns[layer].at(torch.arange(n_pos))
