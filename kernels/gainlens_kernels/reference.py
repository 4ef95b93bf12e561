"""The operator in plain PyTorch: its definition, and the fallback without compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int

from gainlens_kernels.checks import (
    check_bound_values,
    check_bounds,
    check_scale,
    check_tensors,
)

# Scores held at a time; above it the queries are taken in pieces.
_SCORES_AT_ONCE = 1 << 24


def query_chunks(batch: int, heads: int, tq: int, tk: int) -> Iterator[slice]:
    """Slices of the query axis whose scores fit the memory bound."""
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * tk))
    for first in range(0, tq, step):
        yield slice(first, min(tq, first + step))


def allowed_keys(
    queries: slice,
    tq: int,
    tk: int,
    causal: bool,
    lengths: Int[torch.Tensor, "batch"] | None,
    starts: Int[torch.Tensor, "batch"] | None,
    device: torch.device,
) -> torch.Tensor:
    """Boolean ``[batch or 1, 1, queries, tk]``: which keys each query may attend to."""
    key = torch.arange(tk, device=device)
    end = torch.full((1,), tk, device=device) if lengths is None else lengths.clamp(0, tk)
    allowed = key < end.view(-1, 1, 1, 1)
    if starts is not None:
        allowed = allowed & (key >= starts.view(-1, 1, 1, 1))
    if causal:
        # The last query sees up to the last valid key, the one before it one key fewer.
        position = torch.arange(queries.start, queries.stop, device=device).view(1, 1, -1, 1)
        allowed = allowed & (key <= end.view(-1, 1, 1, 1) - tq + position)
    return allowed.expand(allowed.shape[0], 1, queries.stop - queries.start, tk)


def _weighted_values(weights: torch.Tensor, allowed: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``weights @ v``, unaffected by keys that a row may not attend to.

    A plain product would turn 0 · NaN of a masked key into NaN.
    """
    finite = torch.isfinite(v)
    out = weights @ torch.where(finite, v, torch.zeros_like(v))
    if bool(finite.all()):
        return out
    seen = allowed.to(v.dtype).expand(weights.shape)
    positive = (weights > 0).to(v.dtype) * seen
    zero = (weights == 0).to(v.dtype) * seen
    up, down, broken = (v == torch.inf), (v == -torch.inf), torch.isnan(v)
    plus = positive @ up.to(v.dtype) > 0
    minus = positive @ down.to(v.dtype) > 0
    undefined = (seen @ broken.to(v.dtype) > 0) | (zero @ (up | down).to(v.dtype) > 0)
    out = torch.where(plus, torch.full_like(out, torch.inf), out)
    out = torch.where(minus, torch.full_like(out, -torch.inf), out)
    return torch.where(undefined | (plus & minus), torch.full_like(out, torch.nan), out)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax over the allowed keys, ``[batch, heads, tq, tk]``; zeros in rows without any."""
    group = q.shape[1] // k.shape[1]
    batch, heads, tq, d_qk = q.shape
    scores = q.reshape(batch, heads // group, group * tq, d_qk) @ k.mT * scale
    scores = scores.view(batch, heads, tq, k.shape[2])
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    # Masked entries are exact zeros also in a row that is NaN or has no key at all.
    return torch.where(allowed.any(-1, keepdim=True), weights, torch.zeros_like(weights))


def compute_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """``reference`` without the checks."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, tq, _ = q.shape
    tk, group = k.shape[2], heads // k.shape[1]
    out = torch.empty((batch, heads, tq, v.shape[3]), dtype=q.dtype, device=q.device)
    k, v = k.to(wide), v.to(wide)
    v = v.repeat_interleave(group, 1) if group > 1 else v
    for rows in query_chunks(batch, heads, tq, tk):
        allowed = allowed_keys(rows, tq, tk, causal, lengths, starts, q.device)
        weights = attention_weights(q[:, :, rows].to(wide), k, allowed, scale)
        out[:, :, rows] = _weighted_values(weights, allowed, v).to(q.dtype)
    return out


def reference(
    q: Float[torch.Tensor, "batch heads tq d_qk"],
    k: Float[torch.Tensor, "batch kv_heads tk d_qk"],
    v: Float[torch.Tensor, "batch kv_heads tk d_v"],
    *,
    scale: float,
    causal: bool = True,
    lengths: Int[torch.Tensor, "batch"] | None = None,
    starts: Int[torch.Tensor, "batch"] | None = None,
) -> Float[torch.Tensor, "batch heads tq d_v"]:
    """The same in plain PyTorch, on any device; arguments, errors as for ``sliced_attention``.

    Computes in float64 for float64 inputs (the oracle of the tests) and in float32 otherwise.
    """
    check_tensors(q, k, v)
    scale = check_scale(scale)
    for name, bounds in (("lengths", lengths), ("starts", starts)):
        check_bounds(name, bounds, q)
        if q.device.type == "cpu":
            check_bound_values(name, bounds, k.shape[2])
    return compute_reference(q, k, v, scale, causal, lengths, starts)
