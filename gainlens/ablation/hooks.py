"""Hooks that cut key dimensions of a running model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.modes import Context, Replacement, get_mode
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import Hook, attached
from gainlens.model.rotation import Following
from gainlens.model.running import model_device
from gainlens.model.sites import STAGES, KeySites, Stage
from gainlens.probes.gains import KeyGains


class AblationHooks(list[Hook]):
    """``(name, fn)`` hooks for ``run_with_hooks`` that count how often they fired.

    Attributes:
        fires: calls per layer so far.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.fires = [0] * n_layers

    def check_fired(self) -> None:
        """Raise unless every layer was cut, and all equally often.

        Raises:
            SilentSiteError: naming the layers whose hook stayed silent.
        """
        silent = [layer for layer, n in enumerate(self.fires) if n < max(self.fires) or n == 0]
        if silent:
            raise SilentSiteError(
                f"the ablation hooks of layer(s) {silent} stayed silent, so the model was not cut "
                "there; was a full forward pass run, without reset_hooks?"
            )


def ablation_hooks(
    model: Any,
    mask: KeyMask,
    mode: str = "zero",
    *,
    stage: Stage | None = None,
    gains: KeyGains | None = None,
    cache: KeyCache | None = None,
    seed: int = 0,
) -> AblationHooks:
    """Hooks that replace the key dimensions that ``mask`` does not keep.

    The hooks return a new tensor and never write into the model's own. Where a split rotary pair
    is cut on a model without a hook after its rotation, the rotation of the running pass is
    followed, positions and all.

    Args:
        model: a TransformerBridge or HookedTransformer.
        mask: what stays, ``[layer, kv_head, d_head]`` of this model.
        mode: a row of ``gainlens.ablation.modes.MODES``.
        stage: where to cut; by default after every norm and rotation (``rotated``), also on
            models that fire no hook there: their keys are turned, cut and turned back.
        gains: for the modes that need calibration statistics (``mean``).
        cache: for the modes that need the keys of another run (``resample``, ``patch``).
        seed: which other document gives its value in ``resample``.

    Raises:
        InputError: a mask of another shape, gains of another model, an unknown mode or stage, a
            mode without what it needs.
        UnsupportedModelError: a cut at ``projected`` on a model with a norm after it.
    """
    cut = plan_cut(model, mask, mode, stage=stage, gains=gains, cache=cache, seed=seed)
    sites = cut.sites
    at = sites.hook_stage(cut.stage)
    commutes = get_mode(mode).commutes and mask.whole_pairs(sites.partner)
    turn = cut.stage == "rotated" and at == "projected" and not commutes
    hooks = AblationHooks(sites.n_layers)
    device = model_device(model)
    following = sites.rotation.follow() if turn and sites.rotary_dim else None
    if following is not None:
        hooks += following.hooks()
    for layer in range(sites.n_layers):
        fn = partial(
            _cut,
            layer=layer,
            cut=~mask.keep[layer].to(device),
            replacement=cut.replacement,
            following=following,
            fires=hooks.fires,
        )
        hooks.append((sites.key_hook(layer, at), fn))
    return hooks


@dataclass(frozen=True)
class PlannedCut:
    """A checked ablation: where it acts and what it puts in.

    Attributes:
        sites: of the model.
        mask: what stays.
        stage: at which the replacement is meant.
        replacement: what cut dimensions carry.
    """

    sites: KeySites
    mask: KeyMask
    stage: Stage
    replacement: Replacement

    def edit(self, device: torch.device) -> Edit:
        """The same cut for ``gainlens.model.fast_copy``, on keys after every norm and rotation."""
        cuts = (~self.mask.keep).to(device)

        def cut(
            queries: torch.Tensor, keys: torch.Tensor, layer: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return queries, torch.where(cuts[layer], self.replacement(keys, layer), keys)

        return cut


def plan_cut(
    model: Any,
    mask: KeyMask,
    mode: str = "zero",
    *,
    stage: Stage | None = None,
    gains: KeyGains | None = None,
    cache: KeyCache | None = None,
    seed: int = 0,
) -> PlannedCut:
    """Check an ablation's arguments; they and the errors are those of ``ablation_hooks``."""
    sites = key_sites(model)
    row = get_mode(mode)
    if not isinstance(mask, KeyMask):
        raise InputError(
            f"mask={type(mask).__name__}: expected a KeyMask (KeyMask(keep) makes one)"
        )
    if mask.shape != sites.shape:
        raise InputError(
            f"mask has shape {mask.shape}: this model ({sites.architecture}) has "
            f"[layer, kv_head, d_head] = {sites.shape}"
        )
    if gains is not None and gains.shape != sites.shape:
        raise InputError(
            f"gains have shape {gains.shape}: this model ({sites.architecture}) has {sites.shape}"
        )
    if stage is not None and stage not in STAGES:
        raise InputError(f"stage={stage!r} is not one of {', '.join(STAGES)}")
    wanted: Stage = stage or "rotated"
    if wanted == "projected":
        sites.check_projected_cut()
    if cache is not None and cache.stage != wanted:
        raise InputError(
            f"cache was read at stage={cache.stage!r}: this cut acts at {wanted!r}, expected the "
            "same"
        )
    if cache is not None:
        shapes = {tuple(keys.shape[2:]) for keys in cache.keys}
        if len(cache.keys) != sites.n_layers or shapes != {sites.shape[1:]}:
            raise InputError(
                f"cache is of another model: it holds {len(cache.keys)} layers of [kv_head, d_head]"
                f" = {sorted(shapes)}, this model ({sites.architecture}) has {sites.n_layers} of "
                f"{sites.shape[1:]}"
            )
    replacement = row.replacement(Context(sites, wanted, gains, cache, seed))
    return PlannedCut(sites, mask, wanted, replacement)


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
    back = turn.heads(torch.where(cut, replacement(turned, layer), turned), inverse=True)
    return back


@contextmanager
def ablate(
    model: Any,
    mask: KeyMask,
    mode: str = "zero",
    *,
    stage: Stage | None = None,
    gains: KeyGains | None = None,
    cache: KeyCache | None = None,
    seed: int = 0,
) -> Iterator[AblationHooks]:
    """Cut inside a ``with``; the model is as before on leaving, also after an exception.

    Arguments and errors as for ``ablation_hooks``; hooks of the user's own stay.

    Raises:
        SilentSiteError: on leaving, if no forward pass went through every layer.
    """
    hooks = ablation_hooks(model, mask, mode, stage=stage, gains=gains, cache=cache, seed=seed)
    with attached(model, hooks, cut=True):
        yield hooks
    hooks.check_fired()
