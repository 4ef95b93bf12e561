"""``RefitCut``: a cut whose kept query and key dimensions carry linear maps of the whole head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut, HeadMaps
from gainlens.ablation.cut_files import check_maps, check_refit_file
from gainlens.ablation.key_mask import KeyMask
from gainlens.errors import InputError
from gainlens.files.schema import Mismatch
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.rotation import Turn
from gainlens.model.sites import KeySites

Step = Callable[[torch.Tensor], torch.Tensor]


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
        try:
            check_maps(mask.keep, query_maps, key_maps)
        except Mismatch as error:
            raise InputError(str(error)) from None

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
    def check_file(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """See ``Cut.check_file``."""
        check_refit_file(tensors, facts)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> RefitCut:
        """See ``Cut.from_tensors``."""
        mask = KeyMask(tensors["keep"], {k: v for k, v in facts.items() if k != "refit"})
        return cls(mask, tensors["query_maps"], tensors["key_maps"], facts["refit"])

    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """See ``Cut.edit``: the maps act in the frame before the rotation."""
        sites = key_sites(model)
        self.check(sites)
        n_pos = batch.shape[1]
        places = torch.arange(n_pos)
        turns = [
            self.steps(n, partial(sites.rotation.turn, n, n_pos), lambda: places, rotated=True)
            for n in range(sites.n_layers)
        ]

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
        following = sites.rotation.follow()
        if stage == "rotated" or self.maps.frequencies is not None:
            hooks += following.hooks()

        def at(
            tensor: torch.Tensor, hook: Any, *, maps: torch.Tensor, letter: str, layer: int
        ) -> torch.Tensor:
            hooks.fires[layer] += letter == "k"
            running = letter, layer, tensor.shape[1]
            before, after = self.steps(
                layer,
                partial(following.turn, *running),
                partial(following.positions, *running),
                rotated=stage == "rotated",
            )
            return mapped(tensor, maps, before, after)

        for layer in range(sites.n_layers):
            for name, maps, letter in (
                (sites.query_hook(layer, stage), self.query_maps[layer], "q"),
                (sites.key_hook(layer, stage), self.key_maps[layer], "k"),
            ):
                hooks.append((name, partial(at, maps=maps, layer=layer, letter=letter)))
        return hooks

    def steps(
        self,
        layer: int,
        own: Callable[[], Turn],
        positions: Callable[[], Int[torch.Tensor, "*batch pos"]],
        *,
        rotated: bool,
    ) -> tuple[Step | None, Step | None]:
        """What is done to ``[batch, head, pos, d_head]`` before the maps of a layer and after.

        Args:
            layer: which one.
            own: the model's rotation in the pass.
            positions: of the queries or keys in the pass.
            rotated: whether they come (and go) rotated by the model.
        """
        if not rotated:
            return None, None
        turn = own().by_head()
        return partial(turn, inverse=True), turn

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
    before: Step | None,
    after: Step | None,
) -> Float[torch.Tensor, "batch pos head d_head"]:
    """One map per head, between two steps on ``[batch, head, pos, d_head]``."""
    by_head = x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    if before is not None:
        by_head = before(by_head)
    new = torch.einsum("bhpi,hri->bhpr", by_head, maps.to(by_head))
    if after is not None:
        new = after(new)
    return new.transpose(1, 2).to(x.dtype)
