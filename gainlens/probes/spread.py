"""The attention-weighted spread of each unit's contribution to the attention logit, streaming."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from gainlens.model.hooks import Hook
from gainlens.model.recorder import query_key_hooks
from gainlens.model.sites import KeySites, Stage

Sums = dict[str, torch.Tensor]


def spread_hooks(sites: KeySites, sums: Sums) -> list[Hook]:
    """Hooks that add Σ over queries of the variance over keys, weighted by the attention.

    A dimension's contribution to the logit of query i and key j is q_i·k_j in that dimension, times
    the layer's scale, after the rotation and before any soft cap. ``logit_sq`` is its variance;
    ``logit_cross`` is its covariance with the contribution of its rotary partner.
    """
    waiting: dict[tuple[str, int], torch.Tensor] = {}
    where = "rotated" if sites.rotary_dim else "projected"
    partner = sites.partner

    def hold(letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        waiting[letter, layer] = x.float()

    def add(pattern: torch.Tensor, hook: Any, *, layer: int) -> None:
        q, k = waiting.pop(("q", layer)), waiting.pop(("k", layer))
        square, cross = logit_spread(q, k, pattern.detach().float(), partner.to(q.device))
        for name, value in (("logit_sq", square), ("logit_cross", cross)):
            target = sums[f"{name}.{where}"]
            target[layer] += value.to(target) * sites.logit_scale[layer] ** 2

    hooks = query_key_hooks(sites, hold)
    for layer in range(sites.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_pattern", partial(add, layer=layer)))
    return hooks


def logit_spread(
    queries: Float[torch.Tensor, "batch pos head d_head"],
    keys: Float[torch.Tensor, "batch pos kv_head d_head"],
    pattern: Float[torch.Tensor, "batch head pos pos2"],
    partner: torch.Tensor,
) -> tuple[Float[torch.Tensor, "kv_head d_head"], Float[torch.Tensor, "kv_head d_head"]]:
    """Variance, and covariance with the partner, summed over batch, queries and query heads.

    One key head at a time, so only a few ``[batch, group, pos, d_head]`` tensors are in memory.
    """
    group = queries.shape[2] // keys.shape[2]
    squares, crosses = [], []
    for head in range(keys.shape[2]):
        k = keys[:, None, :, head]
        # Subtracting the mean does not change the variance but avoids cancellation in float32: keys
        # with a large bias (Qwen2) have means in the hundreds.
        k = k - k.mean(2, keepdim=True)
        weights = pattern[:, head * group : (head + 1) * group]
        q = queries[:, :, head * group : (head + 1) * group].transpose(1, 2)
        mean = weights @ k
        own = q.square() * (weights @ k.square() - mean.square())
        other = q * q[..., partner] * (weights @ (k * k[..., partner]) - mean * mean[..., partner])
        squares.append(
            own.sum((0, 1, 2), dtype=torch.float64 if own.device.type != "mps" else None)
        )
        crosses.append(other.sum((0, 1, 2), dtype=squares[-1].dtype))
    return torch.stack(squares), torch.stack(crosses)
