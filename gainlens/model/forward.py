"""Memory-efficient forward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int

from gainlens.errors import SilentSiteError
from gainlens.model.fast_copy import Edit, FastCopy, build_fast_copy, family_head
from gainlens.model.hooks import attached, hook_point
from gainlens.model.running import evaluating, held, model_device

Head = Callable[[torch.Tensor], torch.Tensor]

HEAD_INPUT = "unembed.hook_in"
_STANDS_ALONE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
HEAD_POSITIONS = 64
"""Positions per call of the output head: 64 × 49,152 logits fit in a CPU's caches."""


def forward_layers(model: Any, tokens: Int[torch.Tensor, "document pos"]) -> None:
    """Run every layer in eval mode to fire its hooks, without gradients.

    No logits are computed where the head can be left out: they would take a fifth of the time on a
    vocabulary of 49,152, and more than half on one of 262,144.
    """
    with torch.inference_mode(), held(model), evaluating(model):
        before_head(model, tokens.to(model_device(model)))


def token_losses(
    model: Any, tokens: Int[torch.Tensor, "document pos"]
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss in nats per position, float32 on the CPU, ``[document, pos - 1]``.

    The model runs in eval mode.
    """
    tokens = tokens.to(model_device(model))
    with torch.inference_mode(), held(model), evaluating(model):
        hidden, head = before_head(model, tokens)
        return cross_entropy(head, hidden, tokens)


def before_head(
    model: Any, tokens: Int[torch.Tensor, "document pos"]
) -> tuple[Float[torch.Tensor, "document pos width"], Head]:
    """Run a model up to its output head, which can then be applied to a few positions at a time.

    The logits of 1,024 tokens over a vocabulary of 262,144 take a gigabyte, and so does their
    gradient. A bridge always calls its head, so the head is given only the first position. If the
    head can't be called separately, or has hooks on it, all logits are computed at once.

    Args:
        model: a TransformerBridge or HookedTransformer; hooks on it are run.
        tokens: on the model's device.

    Returns:
        The head's input, and the head as a function from ``[1, pos, width]`` to logits
        ``[1, pos, vocab]``. If the head can't be called separately: all logits and the identity.

    Raises:
        SilentSiteError: the model did not call its head exactly once.
    """
    if not hasattr(model, "original_model"):
        # A HookedTransformer's head is a separate module.
        hidden = model(tokens, return_type=None, stop_at_layer=int(model.cfg.n_layers))
        return hidden, partial(hooked_head, model)
    hooked = any(p.fwd_hooks for name, p in model.hook_dict.items() if "unembed" in name)
    if hooked or not _head_stands_alone(model):
        return model(tokens, return_type="logits"), _identity
    kept: list[torch.Tensor] = []

    def first_alone(x: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.append(x)
        return x[:, :1]

    with attached(model, [(HEAD_INPUT, first_alone)]):
        model(tokens, return_type="logits")
    if len(kept) != 1:
        raise SilentSiteError(f"the model called its output head {len(kept)} times in one pass")
    return kept[0], family_head(model.original_model)


def _head_stands_alone(model: Any) -> bool:
    """Whether a bridge's logits are exactly its family's head applied to the last hidden state.

    Tested on a copy that shares the weights but has none of the user's hooks.
    """
    known = _STANDS_ALONE.get(model)
    if known is None:
        known = hook_point(model, HEAD_INPUT) is not None and _same_in_parts(model)
        _STANDS_ALONE[model] = known
    return known


def _same_in_parts(model: Any) -> bool:
    copied = build_fast_copy(model)
    if copied is None:
        return False
    with torch.inference_mode():
        tokens = torch.arange(4, device=copied.device)[None] % int(model.cfg.d_vocab)
        try:
            whole = copied.model(input_ids=tokens, use_cache=False).logits
            part = copied.logits(copied.hidden(tokens)[:, 1:3])
        except Exception:  # a family that can't be run this way
            return False
    return torch.allclose(whole[:, 1:3].float(), part.float(), rtol=1e-3, atol=1e-4)


def fast_losses(
    fast_copy: FastCopy, tokens: Int[torch.Tensor, "document pos"], edit: Edit | None = None
) -> Float[torch.Tensor, "document next_pos"]:
    """Like ``token_losses``, using a fast copy's fused attention, with ``edit`` in every layer.

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
    head: Head,
    hidden: Float[torch.Tensor, "document pos width"],
    tokens: Int[torch.Tensor, "document pos"],
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss in nats; the output head is applied to a few positions at a time.

    Args:
        head: function from ``[1, pos, width]`` to logits ``[1, pos, vocab]``.
        hidden: the head's input at every position.
        tokens: the text; the last position of ``hidden`` has no next token and is left out.
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    losses = torch.empty(len(targets), dtype=torch.float32)
    for start in range(0, len(targets), HEAD_POSITIONS):
        part = slice(start, start + HEAD_POSITIONS)
        logits = head(flat[None, part])[0].float()
        loss = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        losses[part] = loss.cpu()
    return losses.reshape(tokens.shape[0], -1)


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def hooked_head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states by the model's own head, with its hooks and soft cap."""
    logits: torch.Tensor = model.unembed(model.ln_final(hidden))
    cap = getattr(model.cfg, "output_logits_soft_cap", 0.0)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits
