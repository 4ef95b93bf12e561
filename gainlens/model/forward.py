"""Forward passes that keep no more than they need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.errors import SilentSiteError
from gainlens.model.fast_copy import Edit, FastCopy
from gainlens.model.running import evaluating, held, model_device

HEAD_POSITIONS = 64
"""Positions that the output head sees at a time: 64 × 49,152 logits stay within a CPU's caches."""


def forward_layers(model: Any, tokens: Int[torch.Tensor, "document pos"]) -> None:
    """Run every layer for the sake of its hooks, in eval mode; no logits, no gradient."""
    with torch.inference_mode(), held(model), evaluating(model):
        model(tokens.to(model_device(model)), return_type=None)


def token_losses(
    model: Any, tokens: Int[torch.Tensor, "document pos"]
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss in nats per position, float32 on the CPU, ``[document, pos - 1]``.

    The model is run in eval mode.
    """
    tokens = tokens.to(model_device(model))
    with torch.inference_mode(), held(model), evaluating(model):
        if hasattr(model, "original_model"):
            logits = model(tokens, return_type="logits")
            return cross_entropy(lambda part: part, logits, tokens)
        # A HookedTransformer's head is a module of its own, so it can be fed piece by piece.
        hidden = model(tokens, return_type=None, stop_at_layer=int(model.cfg.n_layers))
        return cross_entropy(partial(_hooked_head, model), hidden, tokens)


def fast_losses(
    fast_copy: FastCopy, tokens: Int[torch.Tensor, "document pos"], edit: Edit | None = None
) -> Float[torch.Tensor, "document next_pos"]:
    """As ``token_losses``, by a fast copy's fused attention, with ``edit`` made in every layer.

    Raises:
        SilentSiteError: the edit was not called once per layer.
    """
    with torch.inference_mode(), fast_copy.edited(edit):
        tokens = tokens.to(fast_copy.device)
        hidden = fast_copy.hidden(tokens)
        if not fast_copy.complete:
            raise SilentSiteError("a layer of the model ran without calling its attention function")
        return cross_entropy(fast_copy.logits, hidden, tokens)


def cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: Float[torch.Tensor, "document pos width"],
    tokens: Int[torch.Tensor, "document pos"],
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss in nats, the output head applied to a few positions at a time.

    Args:
        head: from ``[1, pos, width]`` to logits ``[1, pos, vocab]``.
        hidden: what the head reads at every position.
        tokens: the text; the last position of ``hidden`` predicts nothing and is left out.
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    losses = torch.empty(len(targets), dtype=torch.float32)
    for start in range(0, len(targets), HEAD_POSITIONS):
        part = slice(start, start + HEAD_POSITIONS)
        logits = head(flat[None, part])[0].float()
        loss = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        losses[part] = loss.cpu()
    return losses.reshape(tokens.shape[0], -1)


def _hooked_head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.unembed(model.ln_final(hidden))
    cap = getattr(model.cfg, "output_logits_soft_cap", 0.0)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits
