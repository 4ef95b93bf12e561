"""Losses of a model with and without a cut, by the fastest method that gives the same numbers.

An ``Evaluator`` belongs to a model, and a ``TextLosses`` to a model and a text. The fast copy is
verified once, and the intact losses and those of every cut are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import KeyMask
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.fast_copy import Edit, FastCopy, build_fast_copy
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import before_head, cross_entropy, fast_losses, token_losses
from gainlens.model.hooks import attached
from gainlens.model.running import evaluating, held, model_device
from gainlens.model.tokens import model_batches

SAME_LOSS = 1e-4
"""Largest allowed difference in the mean loss of a document, in nats, between the two methods on a
few tokens. Above it, the hooks are used."""

SAME_TOKEN_LOSS = 1e-3
"""The same for a single token. Losses near 20 nats on random tokens are sensitive to rounding:
there, float32 differs from float64 by up to 3e-4 with either matrix library."""


class Evaluator:
    """Losses of one model, intact or cut; its weights must not change while it is used.

    A bridge is also run through a fast copy that shares its weights
    (``gainlens.model.fast_copy``) and uses fused attention. The fast copy is used only if it
    reproduces the losses of the bridge, intact and with random dimensions cut, and only while the
    bridge has no other hooks.

    Args:
        model: a TransformerBridge or HookedTransformer.
        fast: allow the fast copy.

    Attributes:
        fast_copy: the verified fast copy, or None if hooks are used.
    """

    def __init__(self, model: Any, *, fast: bool = True) -> None:
        self.model = model
        self.sites = key_sites(model)
        self._hooks = _hooks_on(model)
        usable = fast and not self._hooks
        self.fast_copy = self._verified(build_fast_copy(model)) if usable else None
        self._texts: dict[tuple[str, tuple[int, ...]], TextLosses] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's weights."""
        return model_fingerprint(self.model)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.cfg.d_vocab)

    def _verified(self, fast_copy: FastCopy | None) -> FastCopy | None:
        if fast_copy is None:
            return None
        generator = torch.Generator().manual_seed(0)
        length = min(24, int(getattr(self.model.cfg, "n_ctx", 24) or 24))
        tokens = torch.randint(0, self.vocabulary, (2, length), generator=generator)
        cut = KeyMask(torch.rand(self.sites.shape, generator=generator) < 0.5)
        try:
            pairs = [(fast_losses(fast_copy, tokens), token_losses(self.model, tokens))]
            with attached(self.model, cut.hooks(self.model)):
                hooked = token_losses(self.model, tokens)
            edit = cut.edit(self.model, tokens)
            pairs.append((fast_losses(fast_copy, tokens, edit), hooked))
        except Exception:  # a family that cannot be run this way; use the hooks
            return None
        if not fast_copy.exact:
            return fast_copy if all(torch.equal(a, b) for a, b in pairs) else None
        same = all(
            float((a - b).abs().max()) <= SAME_TOKEN_LOSS
            and float((a - b).mean(1).abs().max()) <= SAME_LOSS
            for a, b in pairs
        )
        return fast_copy if same else None

    def on(self, tokens: Tokens, tokens_per_batch: int = TOKENS_PER_BATCH) -> TextLosses:
        """The losses on a text; the same text returns the same object.

        Args:
            tokens: as for ``probe_gains``.
            tokens_per_batch: upper bound on tokens per forward pass.

        Raises:
            InputError: no document, a document of fewer than two tokens, or ids outside the
                vocabulary.
        """
        documents = list(model_batches(self.model, tokens, tokens_per_batch))
        text = text_fingerprint(documents)
        key = (text, tuple(len(batch) for batch in documents))
        return self._texts.setdefault(key, TextLosses(self, documents, text))

    def tokens(
        self, batch: Int[torch.Tensor, "document pos"], cut: Cut | None = None
    ) -> Float[torch.Tensor, "document next_pos"]:
        """Next-token losses in nats of a batch."""
        self._check_hooks()
        if self.fast_copy is not None:
            return fast_losses(self.fast_copy, batch, self._edit(batch, cut))
        with self._hooked(batch, cut):
            return token_losses(self.model, batch)

    def residuals(
        self, batch: Int[torch.Tensor, "document pos"]
    ) -> list[Float[torch.Tensor, "document pos d_model"]] | None:
        """The input of each layer of the intact model; None without a fast copy."""
        if self.fast_copy is None:
            return None
        with torch.inference_mode():
            return self.fast_copy.residuals(batch.to(self.fast_copy.device))

    def tokens_from(
        self,
        layer: int,
        batch: Int[torch.Tensor, "document pos"],
        cut: Cut,
        residuals: list[torch.Tensor] | None,
    ) -> Float[torch.Tensor, "document next_pos"]:
        """Like ``tokens``, for a cut that does not affect the layers before ``layer``.

        Args:
            layer: the first cut layer.
            batch: the text.
            cut: the cut.
            residuals: from ``residuals(batch)``, to skip the layers before ``layer``.

        Raises:
            SilentSiteError: ``layer`` or a later layer ran without its cut.
        """
        if self.fast_copy is None or residuals is None:
            return self.tokens(batch, cut)
        batch = batch.to(self.fast_copy.device)
        with torch.inference_mode(), self.fast_copy.edited(self._edit(batch, cut)):
            hidden = self.fast_copy.hidden_from(layer, residuals[layer], batch)
            if not self.fast_copy.complete_from(layer):
                raise SilentSiteError("a layer ran without calling its attention function")
            return cross_entropy(self.fast_copy.logits, hidden, batch)

    def last_logits(
        self, batch: Int[torch.Tensor, "document pos"], n: int, cut: Cut | None = None
    ) -> Float[torch.Tensor, "document n vocab"]:
        """As ``logits``, of the last ``n`` positions alone; the others never meet the head.

        Raises:
            SilentSiteError: a layer ran without its cut.
        """
        self._check_hooks()
        with torch.inference_mode():
            if self.fast_copy is not None:
                with self.fast_copy.edited(self._edit(batch, cut)):
                    hidden = self.fast_copy.hidden(batch.to(self.fast_copy.device))
                if not self.fast_copy.complete:
                    raise SilentSiteError("a layer ran without calling its attention function")
                return self.fast_copy.logits(hidden[:, -n:]).float().cpu()
            with held(self.model), evaluating(self.model), self._hooked(batch, cut):
                hidden, head = before_head(self.model, batch.to(model_device(self.model)))
                return torch.stack([head(row[None, -n:])[0].float().cpu() for row in hidden])

    def logits(
        self, batch: Int[torch.Tensor, "document pos"], cut: Cut | None = None
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Logits of a (small) batch, float32 on the CPU."""
        return self.last_logits(batch, batch.shape[1], cut)

    def _check_hooks(self) -> None:
        if _hooks_on(self.model) != self._hooks:
            raise InputError(
                "the hooks on the model have changed since its losses were first computed: "
                "expected a new Evaluator after hooks were added or removed"
            )

    def _edit(self, batch: torch.Tensor, cut: Cut | None) -> Edit | None:
        return None if cut is None else cut.edit(self.model, batch)

    @contextmanager
    def _hooked(self, batch: torch.Tensor, cut: Cut | None) -> Iterator[None]:
        if cut is None:
            yield
            return
        hooks = cut.hooks(self.model, batch)
        with attached(self.model, hooks):
            yield
        hooks.check_fired()


class TextLosses:
    """Losses per document on one text, each computed once; made by ``Evaluator.on``.

    Attributes:
        evaluator: the ``Evaluator`` of the model.
        documents: the text as batches ``[document, pos]``.
        text: fingerprint of the text.
    """

    def __init__(self, evaluator: Evaluator, documents: Sequence[torch.Tensor], text: str) -> None:
        self.evaluator, self.documents, self.text = evaluator, list(documents), text
        self._known: dict[str, list[Float[np.ndarray, " document"]]] = {}

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the text."""
        return sum(batch.numel() for batch in self.documents)

    @property
    def sizes(self) -> list[int]:
        """Number of documents in each batch."""
        return [len(batch) for batch in self.documents]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(len(row) for batch in self.documents for row in batch)

    @property
    def intact(self) -> Float[np.ndarray, " document"]:
        """Loss of each document without a cut, nats per token."""
        return self.losses(None)

    def losses(self, cut: Cut | None) -> Float[np.ndarray, " document"]:
        """Mean next-token loss of each document, nats per token.

        Raises:
            InputError: a cut of another model, or a loss that is not finite.
        """
        return np.concatenate(list(self.by_batch(cut)))

    def by_batch(self, cut: Cut | None) -> Iterator[Float[np.ndarray, " document"]]:
        """Like ``losses``, one batch at a time, so that callers can stop early."""
        known = self._known.setdefault("" if cut is None else cut.digest(), [])
        for number, batch in enumerate(self.documents):
            if number == len(known):
                known.append(self._mean(batch, cut))
            yield known[number]

    def rise(self, cut: Cut) -> Float[np.ndarray, " document"]:
        """Rise of each document's loss with ``cut``, nats per token."""
        difference: Float[np.ndarray, " document"] = self.losses(cut) - self.intact
        return difference

    def _mean(self, batch: torch.Tensor, cut: Cut | None) -> Float[np.ndarray, " document"]:
        per_token = self.evaluator.tokens(batch, cut)
        losses: Float[np.ndarray, " document"] = per_token.double().mean(1).numpy()
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise InputError(
                f"the loss of document {first} of a batch is not finite; expected weights without "
                "NaN or infinity"
            )
        return losses


def evaluator_of(model: Any, given: Evaluator | None) -> Evaluator:
    """``given`` if it belongs to ``model``; a new one if it is None.

    Raises:
        InputError: an evaluator of another model.
    """
    if given is None:
        return Evaluator(model)
    if given.model is not model:
        raise InputError("evaluator is of another model: expected Evaluator(model)")
    return given


def _hooks_on(model: Any) -> frozenset[int]:
    """Identities of the hooks on the model, which a fast copy would not run.

    Hooks that TransformerLens adds itself (OPT's MLP) are not included.
    """
    points = getattr(model, "hook_dict", {})
    return frozenset(
        id(handle.user_hook)
        for point in points.values()
        for handle in (*getattr(point, "fwd_hooks", ()), *getattr(point, "bwd_hooks", ()))
        if not str(getattr(handle.user_hook, "__module__", "")).startswith("transformer_lens.")
    )
