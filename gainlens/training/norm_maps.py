"""Maps behind a norm on queries and keys, as weights of a model in training.

Where nothing stands between a projection and the rotation, a cut's maps fold into the projection,
and training goes on from its rows. Behind a norm they stay matrices of their own. Their kept rows
are then what is trained for ``q`` and ``k``; the projections stay as they are, since the norm's
statistic is of all their rows and each row of a map reads all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import nn

from gainlens.ablation.cut import HeadMaps
from gainlens.model.families import Pairing
from gainlens.model.rotation import Turn
from gainlens.model.sites import pair_partners
from gainlens.training.slices import Slice


class NormMaps(nn.Module):
    """The maps of all layers, one parameter ``[head · d_head, d_head]`` for each letter and layer.

    Args:
        maps: of a cut.
        own: the model's frequencies, radians per token. Dimensions beyond them don't rotate.
        pairing: which dimensions rotate together.
        like: a weight of the model, whose device they get, and its type where that is wider than
            float32.
    """

    def __init__(
        self,
        maps: HeadMaps,
        own: Float[torch.Tensor, "layer rotary_pair"],
        pairing: Pairing,
        like: Float[torch.Tensor, "..."],
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        d_head = maps.keys.shape[-1]
        self._partner = pair_partners(d_head, 2 * own.shape[-1], pairing)
        self._own = own.detach().cpu().double()
        self._facts = dict(maps.facts)
        self._frequencies = maps.frequencies
        self._turns: dict[int, list[Turn]] = {}
        for letter, tensor in (("q", maps.queries), ("k", maps.keys)):
            for layer, heads in enumerate(tensor):
                rows = heads.detach().flatten(0, 1).to(like.device, dtype, copy=True)
                self.register_parameter(f"{letter}{layer}", nn.Parameter(rows, requires_grad=False))

    def forward(
        self, x: Float[torch.Tensor, "batch pos head d_head"], letter: str, layer: int
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """Map queries (``q``) or keys (``k``) that the model has rotated, at positions 0, 1, …

        The maps act before the rotation, so it is undone and done again; its scale cancels.
        """
        turn = self._turn(layer, x.shape[1])
        maps = getattr(self, f"{letter}{layer}").unflatten(0, (x.shape[2], -1))
        wide = x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
        plain = turn(wide, inverse=True)
        new = turn(torch.einsum("bhpd,hrd->bhpr", plain, maps.to(plain.dtype)).to(plain.dtype))
        return new.transpose(1, 2).to(x.dtype)

    def slices(
        self, keep: Bool[torch.Tensor, "layer kv_head d_head"], train: tuple[str, ...]
    ) -> list[Slice]:
        """The kept rows of the maps whose letters are trained.

        Args:
            keep: of the plan.
            train: see ``gainlens.training.find.TRAINABLE``.
        """
        found = []
        for name, stored in self.named_parameters():
            letter, layer = name[0], int(name[1:])
            if letter not in train:
                continue
            kept = keep[layer].repeat_interleave(len(stored) // keep[layer].numel(), 0)
            rows = kept.flatten().nonzero()[:, 0].to(stored.device)
            leaf = stored.detach()[rows].clone().requires_grad_()
            found.append(
                Slice(
                    f"maps.{letter}.{layer}",
                    "qk",
                    stored,
                    [(self, name)],
                    trained=rows,
                    leaf=leaf,
                    written=rows,
                )
            )
        return found

    def present(
        self,
        facts: Mapping[str, Any] | None = None,
        frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"] | None = None,
    ) -> HeadMaps:
        """The stored maps, as of a cut.

        Args:
            facts: more of them.
            frequencies: of the slots, where they have changed.
        """
        found = {}
        for letter in "qk":
            rows = [getattr(self, f"{letter}{n}").detach().cpu() for n in range(len(self._own))]
            whole = torch.stack(rows)
            found[letter] = whole.reshape(len(rows), -1, whole.shape[2], whole.shape[2])
        about = {**self._facts, **(facts or {})}
        turning = self._frequencies if frequencies is None else frequencies
        return HeadMaps(found["q"], found["k"], about, turning)

    def _turn(self, layer: int, n_pos: int) -> Turn:
        """The model's rotation in a layer; layers that agree share it."""
        if n_pos not in self._turns:
            self._turns.clear()
            turns: list[Turn] = []
            for number, own in enumerate(self._own):
                if number and torch.equal(own, self._own[number - 1]):
                    turns.append(turns[-1])
                else:
                    turns.append(Turn.of_frequencies(own, self._partner, torch.arange(n_pos)))
            self._turns[n_pos] = turns
        return self._turns[n_pos][layer]
