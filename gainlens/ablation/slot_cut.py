"""``SlotCut``: kept pairs that turn by frequencies of their own choosing, and what they carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.ablation.cut import HeadMaps
from gainlens.ablation.cut_files import check_slots_file
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut, Step
from gainlens.errors import InputError
from gainlens.model.rotation import Turn
from gainlens.model.sites import KeySites

SAME_FREQUENCY = 1e-5
"""Radians per token by which a model's frequencies may differ from those that slots were fitted to;
two ways of measuring one rotation differ by less."""


class SlotCut(RefitCut):
    """A mask whose kept pairs are slots: each turns by a frequency that was chosen for it.

    Before the rotation, query head h reads ``query_maps[layer, h] @ q`` and key head g
    ``key_maps[layer, g] @ k``, as in a ``RefitCut``; slot pair s of key head g then turns by
    ``frequencies[layer, g, s]`` instead of the model's own frequency.
    ``gainlens.ablation.fit_slots`` puts slots into the first pairs, so that all heads keep the same
    dimensions.

    Args:
        mask: what stays, whole pairs: each is a slot.
        query_maps, key_maps: as for ``RefitCut``.
        frequencies: radians per token, float64 ``[layer, kv_head, rotary_pair]``; those of pairs
            that are cut mean nothing.
        own: the model's frequencies ``[layer, rotary_pair]``, which the maps undo.
        assigned: the rotary pair that a slot was first given, ``[layer, kv_head, rotary_pair]``; -1
            where there is none.
        facts: how it was made.

    Raises:
        InputError: as for ``RefitCut``; frequencies that are negative, not finite, of another
            shape, or as many as no head of this width has.
    """

    kind = "slots"

    def __init__(
        self,
        mask: KeyMask,
        query_maps: Float[torch.Tensor, "layer head d_head d_head2"],
        key_maps: Float[torch.Tensor, "layer kv_head d_head d_head2"],
        frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"],
        own: Float[torch.Tensor, "layer rotary_pair"],
        assigned: Int[torch.Tensor, "layer kv_head rotary_pair"] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(mask, query_maps, key_maps, facts)
        self.frequencies = frequencies.double().contiguous()
        self.own = own.double().contiguous()
        shape = tuple(frequencies.shape)
        if assigned is None:
            assigned = torch.full(shape, -1)
        self.assigned = assigned
        n_layers, n_kv, d_head = mask.shape
        n_pairs = own.shape[-1]
        if (
            shape != (n_layers, n_kv, n_pairs)
            or tuple(own.shape) != (n_layers, n_pairs)
            or not 0 < 2 * n_pairs <= d_head
            or assigned.shape != frequencies.shape
        ):
            raise InputError(
                f"frequencies have shape {shape}, own {tuple(own.shape)}, assigned "
                f"{tuple(assigned.shape)}: the mask {mask.shape} takes [layer, kv_head, pair] and "
                f"[layer, pair] with at most {d_head // 2} pairs"
            )
        for name, values in (("frequencies", self.frequencies), ("own", self.own)):
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                raise InputError(
                    f"{name} hold numbers from {float(values.min()):.4g} to "
                    f"{float(values.max()):.4g}: expected finite radians per token of 0 or above"
                )

    def __repr__(self) -> str:
        made = ", ".join(
            f"{name}={self.facts[name]}" for name in ("scope", "fraction") if name in self.facts
        )
        return f"SlotCut({self.shape}, keeps {self.fraction_kept:.1%}{', ' + made if made else ''})"

    @property
    def maps(self) -> HeadMaps:
        """What folds into the projections, and the frequencies that follow."""
        return HeadMaps(self.query_maps, self.key_maps, self.facts, self.frequencies)

    @property
    def all_facts(self) -> dict[str, Any]:
        """Facts of the mask, and of the slots under ``slots``."""
        return {**self.mask.facts, "slots": self.facts}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mask, maps and frequencies."""
        return {
            **super().tensors(),
            "frequencies": self.frequencies,
            "own": self.own,
            "assigned": self.assigned,
        }

    @classmethod
    def check_file(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """See ``Cut.check_file``."""
        check_slots_file(tensors, facts)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> SlotCut:
        """See ``Cut.from_tensors``."""
        mask = KeyMask(tensors["keep"], {k: v for k, v in facts.items() if k != "slots"})
        return cls(
            mask,
            tensors["query_maps"],
            tensors["key_maps"],
            tensors["frequencies"],
            tensors["own"],
            tensors["assigned"],
            facts["slots"],
        )

    def steps(
        self,
        layer: int,
        own: Callable[[], Turn],
        positions: Callable[[], Int[torch.Tensor, "*batch pos"]],
        *,
        rotated: bool,
    ) -> tuple[Step | None, Step | None]:
        """See ``RefitCut.steps``; what the model rotates later is turned back by that before."""
        turn = own().by_head()
        slots = Turn.of_frequencies(
            self.frequencies[layer][:, None], turn.partner, positions()[..., None, :]
        ).sized(turn)

        def after(x: torch.Tensor) -> torch.Tensor:
            turned = slots.for_heads(x.shape[1])(x)
            return turned if rotated else turn(turned, inverse=True)

        return (partial(turn, inverse=True) if rotated else None), after

    def only(self, layer: int, kv_head: int | None = None) -> SlotCut:
        """The same in one layer, or one of its key heads, alone; the identity elsewhere."""
        maps = super().only(layer, kv_head)
        heads = slice(None) if kv_head is None else slice(kv_head, kv_head + 1)
        frequencies = self.own[:, None].expand(self.frequencies.shape).clone()
        assigned = torch.full_like(self.assigned, -1)
        frequencies[layer, heads] = self.frequencies[layer, heads]
        assigned[layer, heads] = self.assigned[layer, heads]
        return SlotCut(
            maps.mask, maps.query_maps, maps.key_maps, frequencies, self.own, assigned, self.facts
        )

    def check(self, sites: KeySites) -> None:
        """Raise ``InputError`` unless the slots were fitted to the rotation of these ``sites``."""
        super().check(sites)
        if self.own.shape != sites.frequencies.shape:
            raise InputError(
                f"cut has slots for {self.own.shape[1]} rotary pairs: this model "
                f"({sites.architecture}) has {sites.frequencies.shape[1]}"
            )
        off = float((self.own - sites.frequencies).abs().max())
        if off > SAME_FREQUENCY:
            raise InputError(
                f"cut has slots fitted to frequencies that differ by up to {off:.1e} radians per "
                f"token from those of this model ({sites.architecture}): expected the same model"
            )
        if not self.mask.whole_pairs(sites.partner):
            raise InputError(
                f"cut has slots that split a rotary pair of this model ({sites.architecture})"
            )
