"""Gradients, by recomputing the weights a piece of the queries at a time."""

from __future__ import annotations

import torch

from gainlens_kernels.reference import allowed_keys, attention_weights, query_chunks


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``sliced_attention`` with respect to q, k and v.

    Computes in float32 (float64 for float64 inputs); memory grows with the keys, not with
    queries × keys.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, tq, _ = q.shape
    kv_heads, tk = k.shape[1], k.shape[2]
    group = heads // kv_heads
    inputs = (q.dtype, k.dtype, v.dtype)
    q, k, v, grad = q.to(wide), k.to(wide), v.to(wide), grad.to(wide)
    if lengths is not None or starts is not None:
        # Padding may hold anything, NaN included; it must not meet a zero weight.
        everything = slice(0, 1)
        valid = allowed_keys(everything, 1, tk, False, lengths, starts, q.device).mT
        k, v = k.where(valid, k.new_zeros(())), v.where(valid, v.new_zeros(()))
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def by_kv_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch, kv_heads, group * x.shape[2], x.shape[3])

    for rows in query_chunks(batch, heads, tq, tk):
        allowed = allowed_keys(rows, tq, tk, causal, lengths, starts, q.device)
        weights = attention_weights(q[:, :, rows], k, allowed, scale)
        p, g, x = by_kv_head(weights), by_kv_head(grad[:, :, rows]), by_kv_head(q[:, :, rows])
        d_v += p.mT @ g
        d_p = g @ v.mT
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        d_q[:, :, rows] = (d_s @ k).view_as(q[:, :, rows])
        d_k += d_s.mT @ x
    return (
        d_q.contiguous().to(inputs[0]),
        d_k.contiguous().to(inputs[1]),
        d_v.contiguous().to(inputs[2]),
    )
