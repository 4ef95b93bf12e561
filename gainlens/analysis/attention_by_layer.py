"""What every layer of the intact model attends with, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.errors import SilentSiteError, UnsupportedModelError
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached
from gainlens.model.recorder import query_key_hooks
from gainlens.model.running import is_exact

Receive = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the layer, its queries ``[document, pos, head, d_head]`` and keys
``[document, pos, kv_head, d_head]``, both after every norm and rotation."""

TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2
"""Largest difference in what a head hands on, relative to its largest value, that rounding
explains, in float32 and below it."""
CHUNK = 1 << 22
"""Attention weights that are held at a time: 32 MB in float64."""


def hand_over_attention(
    evaluator: Evaluator, batch: Int[torch.Tensor, "document pos"], receive: Receive
) -> None:
    """Run the intact model and hand over the queries and keys of every layer as they come.

    By the fast copy where there is one: it never holds an attention pattern, so memory grows with
    the length in proportion. Else by hooks.

    Args:
        evaluator: of the model.
        batch: the text.
        receive: takes each layer's.

    Raises:
        UnsupportedModelError: on this text some layer's attention is more than causal attention
            with one scale.
        SilentSiteError: a layer was not seen.
    """
    seen = [0] * evaluator.sites.n_layers

    def counted(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        seen[layer] += 1
        receive(layer, queries, keys)

    if evaluator.fast_copy is not None:
        _by_fast_copy(evaluator, batch, counted)
    else:
        _by_hooks(evaluator, batch, counted)
    if any(n != 1 for n in seen):
        silent = next(layer for layer, n in enumerate(seen) if n != 1)
        raise SilentSiteError(
            f"queries and keys of layer {silent} came {seen[silent]} times in one pass: expected 1"
        )


def _by_fast_copy(evaluator: Evaluator, batch: torch.Tensor, receive: Receive) -> None:
    fast_copy = evaluator.fast_copy
    assert fast_copy is not None

    def record(
        queries: torch.Tensor, keys: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not fast_copy.plain:
            raise _more_than_causal(evaluator, layer)
        receive(layer, queries, keys)
        return queries, keys

    fast_copy.plain = True  # a window may have shown on a longer text
    with torch.inference_mode(), fast_copy.edited(record):
        fast_copy.hidden(batch.to(fast_copy.device))


def _by_hooks(evaluator: Evaluator, batch: torch.Tensor, receive: Receive) -> None:
    """The same by hooks; that attention is plain is checked on what each head hands on."""
    sites = evaluator.sites
    held: dict[str, torch.Tensor] = {}

    def record(letter: str, layer: int, stage: Any, x: torch.Tensor) -> None:
        held[letter] = x

    def values(x: torch.Tensor, hook: Any) -> None:
        held["v"] = x

    def mixed(z: torch.Tensor, hook: Any, *, layer: int) -> None:
        if not {"q", "k", "v"} <= set(held):
            raise SilentSiteError(f"layer {layer} fired no hook for its queries, keys or values")
        q, k, v = held.pop("q"), held.pop("k"), held.pop("v")
        receive(layer, q, k)
        if not _explains(z, q, k, v, sites.logit_scale[layer], is_exact(evaluator.model)):
            raise _more_than_causal(evaluator, layer)

    hooks: list[Hook] = query_key_hooks(sites, record)
    for layer in range(sites.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_v", values))
        hooks.append((f"blocks.{layer}.attn.hook_z", partial(mixed, layer=layer)))
    with attached(evaluator.model, hooks):
        forward_layers(evaluator.model, batch)


def _explains(
    z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, exact: bool
) -> bool:
    """Whether causal attention with one scale makes ``z`` of the values."""
    n_heads = q.shape[2]
    z = z.reshape(*z.shape[:2], n_heads, -1).float()
    v = v.reshape(*v.shape[:2], k.shape[2], -1).float().repeat_interleave(n_heads // k.shape[2], 2)
    tolerance = (TOLERANCE if exact else HALF_TOLERANCE) * float(v.abs().max())
    for row in range(len(q)):
        for at in query_chunks(q.shape[1], n_heads):
            pattern = causal_attention(q[row], k[row], scale, at)
            found = torch.einsum("hij,jhd->ihd", pattern, v[row, : at.stop])
            if float((found - z[row, at]).abs().max()) > tolerance:
                return False
    return True


def query_chunks(n_pos: int, n_heads: int) -> list[slice]:
    """Positions of the queries whose attention is held at a time."""
    step = max(1, CHUNK // (n_heads * n_pos))
    return [slice(start, min(start + step, n_pos)) for start in range(0, n_pos, step)]


def causal_attention(
    queries: Float[torch.Tensor, "pos head d_head"],
    keys: Float[torch.Tensor, "pos kv_head d_head"],
    scale: float,
    at: slice,
) -> Float[torch.Tensor, "head chunk key_pos"]:
    """Attention of the queries at some positions of a document to all keys up to the last of them.

    Args:
        queries, keys: after every norm and rotation.
        scale: of the logits.
        at: the positions, a slice with a start and a stop.
    """
    group = queries.shape[1] // keys.shape[1]
    q = queries[at].float().transpose(0, 1)
    k = keys[: at.stop].float().transpose(0, 1).repeat_interleave(group, 0)
    logits = scale * (q @ k.transpose(1, 2))
    places = torch.arange(at.stop, device=logits.device)
    return logits.masked_fill(places > places[at, None], -torch.inf).softmax(-1)


def _more_than_causal(evaluator: Evaluator, layer: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{evaluator.sites.architecture}: on this text attention of layer {layer} or one before it "
        "is more than causal attention with one scale (soft cap, window or position bias), which "
        "change_by_distance does not describe"
    )
