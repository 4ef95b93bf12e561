"""Losses of a model with and without a cut, by the fastest way that gives the same numbers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.ablation.ablate import PlannedCut, ablation_hooks, plan_cut
from gainlens.ablation.cache import KeyCache
from gainlens.ablation.mask import KeyMask
from gainlens.ablation.refit import RefitCut
from gainlens.errors import InputError
from gainlens.model.forward import token_losses, twin_losses
from gainlens.model.hooks import attached
from gainlens.model.sites import key_sites
from gainlens.model.twin import Edit, Twin, build_twin
from gainlens.probes.gains import KeyGains

SAME_LOSS = 1e-4
"""Largest difference in nats between the two ways on a few tokens; above it the hooks are used."""


class _Planned(Protocol):
    def edit(self, device: torch.device) -> Edit: ...


class Evaluator:
    """Per-document losses of one model, intact or cut.

    A bridge's model is also run through a twin around the same weights (``gainlens.model.twin``)
    with fused attention. The twin is used only after it gave the bridge's own losses, intact and
    with random dimensions cut, and only while nobody else has hooks on the bridge.

    Args:
        model: a TransformerBridge or HookedTransformer.
        fast: allow the twin.

    Attributes:
        twin: the verified twin, or None where the hooks do the work.
    """

    def __init__(self, model: Any, *, fast: bool = True) -> None:
        self.model = model
        self.sites = key_sites(model)
        self.twin = self._verified(build_twin(model)) if fast and not _hooked(model) else None

    def _verified(self, twin: Twin | None) -> Twin | None:
        if twin is None:
            return None
        generator = torch.Generator().manual_seed(0)
        length = min(24, int(getattr(self.model.cfg, "n_ctx", 24) or 24))
        vocabulary = int(self.model.cfg.d_vocab)
        tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
        mask = KeyMask(torch.rand(self.sites.shape, generator=generator) < 0.5)
        cut = plan_cut(self.model, mask)
        try:
            pairs = [
                (twin_losses(twin, tokens), token_losses(self.model, tokens)),
                (twin_losses(twin, tokens, cut.edit(twin.device)), self._hook_losses(tokens, mask)),
            ]
        except Exception:  # a family that can't be run this way; the hooks do the work
            return None
        tolerance = SAME_LOSS if twin.exact else 0.0
        same = all(float((a - b).abs().max()) <= tolerance for a, b in pairs)
        return twin if same else None

    def _hook_losses(
        self, tokens: torch.Tensor, mask: KeyMask, **settings: Any
    ) -> Float[torch.Tensor, "document next_pos"]:
        hooks = ablation_hooks(self.model, mask, **settings)
        with attached(self.model, hooks):
            losses = token_losses(self.model, tokens)
        hooks.check_fired()
        return losses

    def tokens(
        self,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask | RefitCut | None = None,
        mode: str = "zero",
        gains: KeyGains | None = None,
        seed: int = 0,
    ) -> Float[torch.Tensor, "document next_pos"]:
        """Next-token losses in nats of a batch; ``resample`` takes donors from the batch."""
        if isinstance(cut, RefitCut):
            if self.twin is not None:
                return twin_losses(self.twin, batch, cut.edit(self.sites, batch.shape[1]))
            with attached(self.model, cut.hooks(self.model)):
                return token_losses(self.model, batch)
        if cut is None:
            if self.twin is not None:
                return twin_losses(self.twin, batch)
            return token_losses(self.model, batch)
        cache = KeyCache.run(self.model, batch) if mode == "resample" else None
        if self.twin is None:
            return self._hook_losses(batch, cut, mode=mode, gains=gains, cache=cache, seed=seed)
        planned: PlannedCut = plan_cut(self.model, cut, mode, gains=gains, cache=cache, seed=seed)
        return twin_losses(self.twin, batch, planned.edit(self.twin.device))

    def documents(
        self,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask | RefitCut | None = None,
        mode: str = "zero",
        gains: KeyGains | None = None,
        seed: int = 0,
    ) -> Float[np.ndarray, " document"]:
        """Mean next-token loss of each document of a batch, nats per token.

        Raises:
            InputError: a loss that is not finite.
        """
        per_token = self.tokens(batch, cut, mode, gains, seed)
        losses: Float[np.ndarray, " document"] = per_token.double().mean(1).numpy()
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise InputError(
                f"the loss of document {first} of a batch is not finite; expected weights without "
                "NaN or infinity"
            )
        return losses


def _hooked(model: Any) -> bool:
    """Whether somebody has hooks on the model, which a twin would not run."""
    points = getattr(model, "hook_dict", {})
    return any(
        getattr(p, "fwd_hooks", None) or getattr(p, "bwd_hooks", None) for p in points.values()
    )
