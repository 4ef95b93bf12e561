"""The rotation that turns a model's own frequencies into those of a plan's slots, in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import nn

from gainlens.model.families import Pairing
from gainlens.model.hooks import Hook
from gainlens.model.rotation import Turn
from gainlens.model.sites import pair_partners
from gainlens.training.slices import Slice


class SlotTurns(nn.Module):
    """Turns queries and keys by what the slots' frequencies add to the model's own.

    Rotations of one pair commute, so it does not matter whether the model has rotated yet.

    Heads whose kept pairs have the same frequencies share one row of ``shift``, the logarithm of
    what training multiplies them by, ``[set, rotary_pair]``. So one set of frequencies stays one
    set, no frequency becomes negative, and one of zero stays zero.

    Args:
        frequencies: of the plan, float64 radians per token ``[layer, kv_head, rotary_pair]``.
        own: the model's, ``[layer, rotary_pair]``.
        pairing: how the pairs lie.
        keep: of the plan, ``[layer, kv_head, d_head]``; all dimensions by default.
    """

    def __init__(
        self,
        frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"],
        own: Float[torch.Tensor, "layer rotary_pair"],
        pairing: Pairing = "half",
        keep: Bool[torch.Tensor, "layer kv_head d_head"] | None = None,
    ) -> None:
        super().__init__()
        self._own = own.detach().cpu().double()[:, None]
        self._start = frequencies.detach().cpu().double().expand(len(own), -1, -1)
        d_head = 2 * self._start.shape[-1]
        self._partner = pair_partners(d_head, d_head, pairing)
        first = self._partner > torch.arange(d_head)
        kept = self._start if keep is None else self._start * keep[..., first]
        rows, row = kept.flatten(0, 1).unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
        self._row = row.view(self._start.shape[:2])
        self.shift = nn.Parameter(torch.zeros_like(rows), requires_grad=False)
        self._turns: list[Turn] = []
        self._made_with = self.shift.detach()

    def forward(
        self, x: Float[torch.Tensor, "batch pos head d_head"], layer: int
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """Turn pairs at positions 0, 1, …, in float32 or wider; the dtype stays."""
        turn = self._turn(layer, x.shape[1]).for_heads(x.shape[2])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return turn(wide.transpose(1, 2)).transpose(1, 2).to(x.dtype)

    def frequencies(self) -> Float[torch.Tensor, "layer kv_head rotary_pair"]:
        """The present ones, float64 radians per token."""
        found: torch.Tensor = self._start * self.shift.cpu().exp()[self._row]
        return found

    def slices(self, train: tuple[str, ...]) -> list[Slice]:
        """What is trained of them: the whole shift, or nothing.

        Args:
            train: see ``gainlens.training.find.TRAINABLE``.
        """
        if "frequencies" not in train:
            return []
        leaf = self.shift.detach().clone().requires_grad_()
        return [Slice("slots.shift", "frequencies", self.shift, [(self, "shift")], leaf=leaf)]

    def hooks(self) -> list[Hook]:
        """The same as hooks on the projected queries and keys of a TransformerLens model."""

        def at(x: torch.Tensor, hook: Any, *, layer: int) -> torch.Tensor:
            turned: torch.Tensor = self(x, layer)
            return turned

        return [
            (f"blocks.{layer}.attn.hook_{letter}", partial(at, layer=layer))
            for layer in range(len(self._start))
            for letter in "qk"
        ]

    def _turn(self, layer: int, n_pos: int) -> Turn:
        """The rotation of a layer ``[kv_head, pos, dim]``; layers that agree share it."""
        if torch.is_grad_enabled() and self.shift.requires_grad:  # a graph of each pass
            added = self.frequencies()[layer] - self._own[layer]
            return Turn.of_frequencies(added[:, None], self._partner, torch.arange(n_pos)[None])
        short = not self._turns or self._turns[0].cos.shape[-2] < n_pos
        if short or not torch.equal(self.shift, self._made_with):
            self._turns = self._all_turns(n_pos)
            self._made_with = self.shift.detach().clone()
        return self._turns[layer].at(torch.arange(n_pos))

    @torch.no_grad()
    def _all_turns(self, n_pos: int) -> list[Turn]:
        found: list[Turn] = []
        places, every = torch.arange(n_pos)[None], self.frequencies() - self._own
        for number, added in enumerate(every):
            if number and torch.equal(added, every[number - 1]):
                found.append(found[-1])
            else:
                found.append(Turn.of_frequencies(added[:, None], self._partner, places))
        return found
