"""Losses of a model with and without a cut, by the fastest way that gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.ablation.hooks import ablate, plan_cut
from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.fast_copy import Edit, FastCopy, build_fast_copy
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import cross_entropy, fast_losses, token_losses
from gainlens.model.hooks import attached
from gainlens.model.running import evaluating, held, model_device
from gainlens.probes.gains import KeyGains

SAME_LOSS = 1e-4
"""Largest difference in a document's mean loss, in nats, between the two ways on a few tokens;
above it the hooks are used."""

SAME_TOKEN_LOSS = 1e-3
"""The same for a single token. On random tokens losses near 20 nats hang on rounding: float32 by
either matrix library is up to 3e-4 from float64 there."""


class Evaluator:
    """Per-document losses of one model, intact or cut.

    A bridge's model is also run through a fast copy around the same weights
    (``gainlens.model.fast_copy``) with fused attention. The fast copy is used only after it gave
    the bridge's own losses, intact and with random dimensions cut, and only while nobody else has
    hooks on the bridge.

    Args:
        model: a TransformerBridge or HookedTransformer.
        fast: allow the fast copy.

    Attributes:
        fast_copy: the verified fast copy, or None where the hooks do the work.
    """

    def __init__(self, model: Any, *, fast: bool = True) -> None:
        self.model = model
        self.sites = key_sites(model)
        self.fast_copy = (
            self._verified(build_fast_copy(model)) if fast and not _has_hooks(model) else None
        )

    def _verified(self, fast_copy: FastCopy | None) -> FastCopy | None:
        if fast_copy is None:
            return None
        generator = torch.Generator().manual_seed(0)
        length = min(24, int(getattr(self.model.cfg, "n_ctx", 24) or 24))
        vocabulary = int(self.model.cfg.d_vocab)
        tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
        mask = KeyMask(torch.rand(self.sites.shape, generator=generator) < 0.5)
        cut = plan_cut(self.model, mask)
        try:
            pairs = [
                (fast_losses(fast_copy, tokens), token_losses(self.model, tokens)),
            ]
            with ablate(self.model, mask):
                hooked = token_losses(self.model, tokens)
            pairs.append((fast_losses(fast_copy, tokens, cut.edit(fast_copy.device)), hooked))
        except Exception:  # a family that can't be run this way; the hooks do the work
            return None
        if not fast_copy.exact:
            return fast_copy if all(torch.equal(a, b) for a, b in pairs) else None
        same = all(
            float((a - b).abs().max()) <= SAME_TOKEN_LOSS
            and float((a - b).mean(1).abs().max()) <= SAME_LOSS
            for a, b in pairs
        )
        return fast_copy if same else None

    def tokens(
        self,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask | RefitCut | None = None,
        mode: str = "zero",
        gains: KeyGains | None = None,
        seed: int = 0,
        donors: torch.Tensor | None = None,
    ) -> Float[torch.Tensor, "document next_pos"]:
        """Next-token losses in nats of a batch.

        ``resample`` takes keys from the batch, or from ``donors`` ``[document, pos]`` where given.
        """
        if self.fast_copy is not None:
            return fast_losses(
                self.fast_copy, batch, self._edit(batch, cut, mode, gains, seed, donors)
            )
        with self._hooked(batch, cut, mode, gains, seed, donors):
            return token_losses(self.model, batch)

    def residuals(
        self, batch: Int[torch.Tensor, "document pos"]
    ) -> list[Float[torch.Tensor, "document pos d_model"]] | None:
        """What each layer of the intact model reads; None without a fast copy."""
        if self.fast_copy is None:
            return None
        with torch.inference_mode():
            return self.fast_copy.residuals(batch.to(self.fast_copy.device))

    def tokens_from(
        self,
        layer: int,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask,
        residuals: list[torch.Tensor] | None,
    ) -> Float[torch.Tensor, "document next_pos"]:
        """As ``tokens``, for a cut that leaves the layers before ``layer`` alone.

        Args:
            layer: the first that is cut.
            batch: the text.
            cut: what stays.
            residuals: of ``residuals(batch)``; the layers before ``layer`` are then not run again.

        Raises:
            SilentSiteError: a layer from ``layer`` on ran without its cut.
        """
        if self.fast_copy is None or residuals is None:
            return self.tokens(batch, cut)
        batch = batch.to(self.fast_copy.device)
        edit = self._edit(batch, cut, "zero", None, 0, None)
        with torch.inference_mode(), self.fast_copy.edited(edit):
            hidden = self.fast_copy.hidden_from(layer, residuals[layer], batch)
            if not self.fast_copy.complete_from(layer):
                raise SilentSiteError("a layer ran without calling its attention function")
            return cross_entropy(self.fast_copy.logits, hidden, batch)

    def logits(
        self,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask | RefitCut | None = None,
        mode: str = "zero",
        gains: KeyGains | None = None,
        seed: int = 0,
        donors: torch.Tensor | None = None,
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Logits of a (small) batch, float32 on the CPU."""
        if self.fast_copy is not None:
            with (
                torch.inference_mode(),
                self.fast_copy.edited(self._edit(batch, cut, mode, gains, seed, donors)),
            ):
                found = self.fast_copy.logits(
                    self.fast_copy.hidden(batch.to(self.fast_copy.device))
                )
            return found.float().cpu()
        device = model_device(self.model)
        with (
            torch.inference_mode(),
            held(self.model),
            evaluating(self.model),
            self._hooked(batch, cut, mode, gains, seed, donors),
        ):
            logits: torch.Tensor = self.model(batch.to(device), return_type="logits")
        return logits.float().cpu()

    def _cache(
        self, batch: torch.Tensor, mode: str, donors: torch.Tensor | None
    ) -> KeyCache | None:
        if mode != "resample":
            return None
        return KeyCache.run(self.model, batch if donors is None else donors)

    def _edit(
        self,
        batch: torch.Tensor,
        cut: KeyMask | RefitCut | None,
        mode: str,
        gains: KeyGains | None,
        seed: int,
        donors: torch.Tensor | None,
    ) -> Edit | None:
        assert self.fast_copy is not None
        if cut is None:
            return None
        if isinstance(cut, RefitCut):
            return cut.edit(self.sites, batch.shape[1])
        cache = self._cache(batch, mode, donors)
        planned = plan_cut(self.model, cut, mode, gains=gains, cache=cache, seed=seed)
        return planned.edit(self.fast_copy.device)

    @contextmanager
    def _hooked(
        self,
        batch: torch.Tensor,
        cut: KeyMask | RefitCut | None,
        mode: str,
        gains: KeyGains | None,
        seed: int,
        donors: torch.Tensor | None,
    ) -> Iterator[None]:
        if cut is None:
            yield
        elif isinstance(cut, RefitCut):
            with attached(self.model, cut.hooks(self.model)):
                yield
        else:
            cache = self._cache(batch, mode, donors)
            with ablate(self.model, cut, mode, gains=gains, cache=cache, seed=seed):
                yield

    def documents(
        self,
        batch: Int[torch.Tensor, "document pos"],
        cut: KeyMask | RefitCut | None = None,
        mode: str = "zero",
        gains: KeyGains | None = None,
        seed: int = 0,
        donors: torch.Tensor | None = None,
    ) -> Float[np.ndarray, " document"]:
        """Mean next-token loss of each document of a batch, nats per token; see ``tokens``.

        Raises:
            InputError: a loss that is not finite.
        """
        per_token = self.tokens(batch, cut, mode, gains, seed, donors)
        losses: Float[np.ndarray, " document"] = per_token.double().mean(1).numpy()
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise InputError(
                f"the loss of document {first} of a batch is not finite; expected weights without "
                "NaN or infinity"
            )
        return losses


def resample_donors(documents: Sequence[torch.Tensor], most: int = 3) -> list[torch.Tensor]:
    """For each batch ``[document, pos]`` the documents among which ``resample`` looks for keys.

    A batch of several documents serves itself. One of a single document gets up to ``most`` more
    from the batches after (and before) it, cut to its length.

    Raises:
        InputError: a document to which no other can give keys at all of its positions.
    """
    rows = [(number, row) for number, batch in enumerate(documents) for row in batch]
    donors = []
    for number, batch in enumerate(documents):
        length = batch.shape[1]
        if len(batch) > 1:
            donors.append(batch)
            continue
        later = [row for at, row in rows if at > number and len(row) >= length]
        others = later + [row for at, row in rows if at < number and len(row) >= length]
        if not others:
            raise InputError(
                f"mode='resample' takes keys from another document at the same position: no other "
                f"document of tokens has the {length} positions of the longest one"
            )
        donors.append(torch.stack([batch[0], *(row[:length] for row in others[:most])]))
    return donors


def _has_hooks(model: Any) -> bool:
    """Whether somebody has hooks on the model, which a fast copy would not run.

    Hooks that TransformerLens wires itself (OPT's MLP) carry nothing of the user's.
    """
    points = getattr(model, "hook_dict", {})
    handles = [
        handle
        for point in points.values()
        for handle in (*getattr(point, "fwd_hooks", ()), *getattr(point, "bwd_hooks", ()))
    ]
    return any(
        not str(getattr(handle.user_hook, "__module__", "")).startswith("transformer_lens.")
        for handle in handles
    )
