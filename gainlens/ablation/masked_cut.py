"""``MaskedCut``: a mask with replacement values for the dimensions that it cuts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut
from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.modes import Context, Replacement, get_mode
from gainlens.errors import InputError
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.rotation import Following
from gainlens.model.running import model_device
from gainlens.model.sites import STAGES, KeySites, Stage
from gainlens.probes.gains import KeyGains


class MaskedCut(Cut):
    """A mask in one of the ablation modes.

    Args:
        mask: the dimensions that stay.
        mode: a row of ``gainlens.ablation.modes.MODES``.
        stage: where to cut; by default ``rotated``, after all norms and the rotation.
        gains: calibration statistics, for the modes that need them (``mean``).
        cache: keys of another run, for the modes that need them (``resample``, ``patch``).
        donors: batches ``[document, pos]`` whose keys ``resample`` may use if there is no
            ``cache``. A batch of several documents uses its own.
        seed: selects the other document whose values ``resample`` uses.

    Raises:
        InputError: an unknown mode or stage.
    """

    def __init__(
        self,
        mask: Cut,
        mode: str = "zero",
        *,
        stage: Stage | None = None,
        gains: KeyGains | None = None,
        cache: KeyCache | None = None,
        donors: Sequence[Int[torch.Tensor, "document pos"]] | None = None,
        seed: int = 0,
    ) -> None:
        self._row = get_mode(mode)
        if stage is not None and stage not in STAGES:
            raise InputError(f"stage={stage!r} is not one of {', '.join(STAGES)}")
        self.mask, self.mode, self.stage = mask, mode, stage or "rotated"
        self.gains, self.cache, self.donors, self.seed = gains, cache, donors, seed
        self.facts = {**mask.facts, "mode": mode}

    @property
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """True for what stays."""
        return self.mask.keep

    def tensors(self) -> dict[str, torch.Tensor]:
        """The mask, and everything that determines the replacement values."""
        found = self.mask.tensors()
        if self.mode != "zero":
            found["mode"] = torch.tensor(list(f"{self.mode} {self.stage} {self.seed}".encode()))
        if self.mode == "mean" and self.gains is not None:
            found["means"] = self.gains.mean(self.stage)
        if self.cache is not None:
            found |= {f"cache.{n}": keys for n, keys in enumerate(self.cache.keys)}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> MaskedCut:
        """Not supported: only the mask can be saved."""
        raise InputError("a MaskedCut cannot be saved; save its mask instead")

    def only(self, layer: int, kv_head: int | None = None) -> Cut:
        """The same cut in only one layer or one of its key heads."""
        return self.mask.only(layer, kv_head).in_mode(
            self.mode,
            stage=self.stage,
            gains=self.gains,
            cache=self.cache,
            donors=self.donors,
            seed=self.seed,
        )

    def check(self, sites: KeySites) -> None:
        """As for any cut; gains, cache and stage must match the model too.

        Raises:
            InputError: the shape or the model differs.
            UnsupportedModelError: a cut at ``projected`` on a model with a norm after it.
        """
        super().check(sites)
        if self.gains is not None and self.gains.shape != sites.shape:
            raise InputError(
                f"gains have shape {self.gains.shape}: this model ({sites.architecture}) has "
                f"{sites.shape}"
            )
        if self.stage == "projected":
            sites.check_projected_cut()
        if self.cache is not None:
            self.cache.check(sites, self.stage)

    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """See ``Cut.edit``; the stage must be ``rotated``."""
        if self.stage != "rotated":
            raise InputError(f"stage={self.stage!r}: an edit acts at 'rotated'")
        replacement = self._replacement(model, batch)
        cuts = (~self.keep).to(model_device(model))

        def cut(
            queries: torch.Tensor, keys: torch.Tensor, layer: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return queries, torch.where(cuts[layer], replacement(keys, layer), keys)

        return cut

    def hooks(
        self, model: Any, batch: Int[torch.Tensor, "document pos"] | None = None
    ) -> AblationHooks:
        """See ``Cut.hooks``. On models without a hook after the rotation, keys are rotated, cut
        and rotated back.
        """
        sites = key_sites(model)
        replacement = self._replacement(model, batch)
        at = sites.hook_stage(self.stage)
        commutes = self._row.commutes and self.mask.whole_pairs(sites.partner)
        turn = self.stage == "rotated" and at == "projected" and not commutes
        hooks = AblationHooks(sites.n_layers)
        device = model_device(model)
        following = sites.rotation.follow() if turn and sites.rotary_dim else None
        if following is not None:
            hooks += following.hooks()
        for layer in range(sites.n_layers):
            fn = partial(
                _cut,
                layer=layer,
                cut=~self.keep[layer].to(device),
                replacement=replacement,
                following=following,
                fires=hooks.fires,
            )
            hooks.append((sites.key_hook(layer, at), fn))
        return hooks

    def _replacement(self, model: Any, batch: torch.Tensor | None) -> Replacement:
        sites = key_sites(model)
        self.check(sites)
        cache = self.cache
        if cache is None and self._row.takes_donors and self.donors is not None:
            if batch is None:
                raise InputError(f"mode={self.mode!r} with donors needs the batch to run")
            cache = KeyCache.run(model, donors_for(batch, self.donors))
        return self._row.replacement(Context(sites, self.stage, self.gains, cache, self.seed))


def _cut(
    keys: torch.Tensor,
    hook: Any,
    *,
    layer: int,
    cut: torch.Tensor,
    replacement: Replacement,
    following: Following | None,
    fires: list[int],
) -> torch.Tensor:
    fires[layer] += 1
    if following is None:
        return torch.where(cut, replacement(keys, layer), keys)
    turn = following.turn("k", layer, keys.shape[1])
    turned = turn.heads(keys)
    return turn.heads(torch.where(cut, replacement(turned, layer), turned), inverse=True)


def donors_for(
    batch: Int[torch.Tensor, "document pos"], pool: Sequence[torch.Tensor], most: int = 3
) -> Int[torch.Tensor, "donor pos"]:
    """The documents from which ``resample`` takes keys for a batch.

    A batch of several documents uses its own. A batch of one document gets up to ``most`` others
    from the batches of ``pool`` after (and before) it, truncated to its length.

    Raises:
        InputError: no other document is as long as the batch.
    """
    if len(batch) > 1:
        return batch
    length = batch.shape[1]
    places = [n for n, other in enumerate(pool) if torch.equal(other, batch)]
    place = places[0] if places else -1
    rows = [(n, row) for n, other in enumerate(pool) for row in other]
    others = [row for n, row in rows if n > place and len(row) >= length]
    others += [row for n, row in rows if n < place and len(row) >= length]
    if not others:
        raise InputError(
            "mode='resample' takes keys from another document at the same position, but no other "
            f"document in tokens has {length} positions like the longest one"
        )
    return torch.stack([batch[0], *(row[:length] for row in others[:most])])
