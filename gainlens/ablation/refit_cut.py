"""``RefitCut``: a cut whose kept query and key dimensions carry linear maps of the whole head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut, HeadMaps
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.least_squares import Turn, make_turn
from gainlens.errors import InputError
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.sites import KeySites


class RefitCut(Cut):
    """A mask and the linear maps that the kept dimensions carry instead of their own values.

    Before the rotation, query head h reads ``query_maps[layer, h] @ q`` and key head g
    ``key_maps[layer, g] @ k``; rows of cut dimensions are zero, so both fold into W_Q and W_K.

    Args:
        mask: what stays.
        query_maps: dimensionless, per query head, ``[layer, head, d_head, d_head]``.
        key_maps: dimensionless, per key head, ``[layer, kv_head, d_head, d_head]``.
        facts: how it was made, with the misfit before and after; see ``gainlens.refit``.

    Raises:
        InputError: maps that are not finite, of another shape, or that keep what the mask cuts.
    """

    kind = "refit"

    def __init__(
        self,
        mask: KeyMask,
        query_maps: Float[torch.Tensor, "layer head d_head d_head2"],
        key_maps: Float[torch.Tensor, "layer kv_head d_head d_head2"],
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.mask, self.query_maps, self.key_maps = mask, query_maps, key_maps
        self.facts = dict(facts or {})
        n_layers, n_kv, d_head = mask.shape
        n_heads = query_maps.shape[1] if query_maps.ndim == 4 else 0
        wanted = ((n_layers, n_heads, d_head, d_head), (n_layers, n_kv, d_head, d_head))
        found = (tuple(query_maps.shape), tuple(key_maps.shape))
        if found != wanted or n_heads % n_kv:
            raise InputError(
                f"maps have shapes {found[0]} and {found[1]}: the mask {mask.shape} takes "
                "[layer, head, d_head, d_head] and [layer, kv_head, d_head, d_head]"
            )
        group = n_heads // n_kv
        for name, maps, keep in (
            ("query", query_maps, mask.keep.repeat_interleave(group, 1)),
            ("key", key_maps, mask.keep),
        ):
            if not bool(torch.isfinite(maps).all()):
                raise InputError(f"{name} maps hold NaN or infinity: expected finite numbers")
            kept = (maps != 0).any(-1) & ~keep
            if bool(kept.any()):
                layer, head, dim = (int(n) for n in kept.nonzero()[0])
                raise InputError(
                    f"{name} map of layer {layer}, head {head} has values in dimension {dim}, "
                    "which the mask cuts: expected zero rows there"
                )

    def __repr__(self) -> str:
        return f"RefitCut({self.mask!r})"

    @property
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """What stays, as in ``mask``."""
        return self.mask.keep

    @property
    def maps(self) -> HeadMaps:
        """What folds into the projections."""
        return HeadMaps(self.query_maps, self.key_maps, self.facts)

    @property
    def all_facts(self) -> dict[str, Any]:
        """Facts of the mask, and of the fit under ``refit``."""
        return {**self.mask.facts, "refit": self.facts}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mask and maps."""
        return {"keep": self.keep, "query_maps": self.query_maps, "key_maps": self.key_maps}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> RefitCut:
        """See ``Cut.from_tensors``."""
        mask = KeyMask(tensors["keep"], {k: v for k, v in facts.items() if k != "refit"})
        return cls(mask, tensors["query_maps"], tensors["key_maps"], facts["refit"])

    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """See ``Cut.edit``: the maps act in the frame before the rotation."""
        sites = key_sites(model)
        self.check(sites)
        turns = [self.turns(sites, layer, batch.shape[1], True) for layer in range(sites.n_layers)]

        def cut(
            queries: torch.Tensor, keys: torch.Tensor, layer: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            before, after = turns[layer]
            return (
                mapped(queries, self.query_maps[layer], before, after),
                mapped(keys, self.key_maps[layer], before, after),
            )

        return cut

    def hooks(
        self, model: Any, batch: Int[torch.Tensor, "document pos"] | None = None
    ) -> AblationHooks:
        """See ``Cut.hooks``."""
        sites = key_sites(model)
        self.check(sites)
        stage = sites.hook_stage("rotated")
        hooks = AblationHooks(sites.n_layers)

        def at(
            tensor: torch.Tensor, hook: Any, *, maps: torch.Tensor, layer: int, keys: bool
        ) -> torch.Tensor:
            hooks.fires[layer] += keys
            before, after = self.turns(sites, layer, tensor.shape[1], stage == "rotated")
            return mapped(tensor, maps, before, after)

        for layer in range(sites.n_layers):
            for name, maps, keys in (
                (sites.query_hook(layer, stage), self.query_maps[layer], False),
                (sites.key_hook(layer, stage), self.key_maps[layer], True),
            ):
                hooks.append((name, partial(at, maps=maps, layer=layer, keys=keys)))
        return hooks

    def turns(
        self, sites: KeySites, layer: int, n_pos: int, rotated: bool
    ) -> tuple[Turn | None, Turn | None]:
        """What is undone before the maps of a layer and done after them.

        Args:
            sites: of the model.
            layer: which one.
            n_pos: positions 0, 1, … of the text.
            rotated: whether queries and keys come (and go) rotated by the model.
        """
        turn = make_turn(n_pos, sites.frequencies[layer], sites.partner) if rotated else None
        return turn, turn

    def only(self, layer: int, kv_head: int | None = None) -> RefitCut:
        """The same in one layer, or one of its key heads, alone; the identity elsewhere."""
        n_heads, n_kv = self.query_maps.shape[1], self.key_maps.shape[1]
        group = n_heads // n_kv
        eye = torch.eye(self.shape[2]).to(self.key_maps)
        queries = eye.expand(self.query_maps.shape).clone()
        keys = eye.expand(self.key_maps.shape).clone()
        heads = slice(None) if kv_head is None else slice(kv_head, kv_head + 1)
        rows = slice(None) if kv_head is None else slice(kv_head * group, (kv_head + 1) * group)
        queries[layer, rows] = self.query_maps[layer, rows]
        keys[layer, heads] = self.key_maps[layer, heads]
        return RefitCut(self.mask.only(layer, kv_head), queries, keys, self.facts)

    def check(self, sites: KeySites) -> None:
        """Raise ``InputError`` unless the maps have the shape of the model with these ``sites``."""
        super().check(sites)
        if self.query_maps.shape[1] != sites.n_heads:
            raise InputError(
                f"cut has maps of {self.query_maps.shape[1]} query heads: this model "
                f"({sites.architecture}) has {sites.n_heads}"
            )


def mapped(
    x: Float[torch.Tensor, "batch pos head d_head"],
    maps: Float[torch.Tensor, "head d_head d_head2"],
    before: Turn | None,
    after: Turn | None,
) -> Float[torch.Tensor, "batch pos head d_head"]:
    """One map per head, between undoing one rotation and making another."""
    by_head = x.transpose(1, 2).float()
    if before is not None:
        by_head = before(by_head, inverse=True)
    new = torch.einsum("bhpi,hri->bhpr", by_head, maps.to(by_head))
    if after is not None:
        new = after.for_heads(new.shape[1])(new)
    return new.transpose(1, 2).to(x.dtype)
