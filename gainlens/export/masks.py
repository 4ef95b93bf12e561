"""Masks that a slim attention has to make itself: windows, and biases of the attention logits.

A mask is None (causal), ``[batch]`` (the first position of each text, causal), or ``[batch, 1,
query, key]``, True where a query sees a key or numbers that are added to the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped

from gainlens.export.attention import seen_keys

Mask = Shaped[torch.Tensor, "..."]


def whole(mask: Mask | None, tq: int, tk: int, device: torch.device) -> Mask:
    """``mask`` with every query and key written out."""
    if mask is None or mask.ndim == 1:
        return seen_keys(tq, tk, True, None, mask, device)
    return mask[..., :tk]


def within_window(
    mask: Mask | None, tq: int, tk: int, window: int, device: torch.device
) -> Mask | None:
    """``mask`` with keys out of sight that are ``window`` or more positions behind the query.

    Args:
        mask: what is seen so far.
        tq, tk: numbers of queries and keys; the last query stands at the last key, or at the last
            that a boolean mask lets it see.
        window: how many keys a query sees, its own included.
        device: of the result.
    """
    if tk <= window:
        return mask
    found = whole(mask, tq, tk, device)
    keys = torch.arange(tk, device=device)
    if found.dtype != torch.bool:
        near = keys[tk - tq :, None] - keys < window
        return found.masked_fill(~near, torch.finfo(found.dtype).min)
    # A static cache has room behind the query: it stands at the last key that it sees.
    place = tk - 1 - found.flip(-1).int().argmax(-1, keepdim=True)
    return found & (place - keys < window)


def with_bias(
    mask: Mask | None,
    bias: Float[torch.Tensor, "row one place"],
    tq: int,
    tk: int,
    heads: int,
    dtype: torch.dtype,
) -> Float[torch.Tensor, "batch head _ _"]:
    """What is added to the logits: ``bias`` where a query sees a key.

    Args:
        mask: which those are.
        bias: of each head of each text (of each head alone, if all texts have the same), for the
            last keys or more.
        tq, tk: numbers of queries and keys.
        heads: number of query heads.
        dtype: of the logits.
    """
    seen = whole(mask, tq, tk, bias.device)
    added = bias.reshape(-1, heads, *bias.shape[1:])[..., -tk:].to(dtype)
    if seen.dtype == torch.bool:
        return torch.where(seen, added, torch.finfo(dtype).min)
    total: torch.Tensor = added + seen.to(dtype)
    return total


def own_mask(
    attention: Any,
    mask: Mask | None,
    q: Float[torch.Tensor, "batch head tq width"],
    k: Float[torch.Tensor, "batch kv_head tk width"],
    given: dict[str, Any],
) -> Mask | None:
    """A model's mask with what a ``SlimAttention`` adds to it.

    Args:
        attention: the module.
        mask: that the model passes it.
        q, k: queries and all keys.
        given: the other arguments of the model; biases are taken out.
    """
    tq, tk = q.shape[2], k.shape[2]
    if attention.whole_masks and mask is not None:
        mask = ~mask  # such models turn numbers into True where nothing is seen
    if attention.own_window is not None:
        mask = within_window(mask, tq, tk, attention.own_window, q.device)
    if attention.alibi:
        biases = [given.pop(name, None) for name in ("alibi", "position_bias")]
        bias = next(x for x in biases if x is not None)
        mask = with_bias(mask, bias, tq, tk, q.shape[1], q.dtype)
    return mask
