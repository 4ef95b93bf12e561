"""Every other way to compute the same rows with PyTorch, each in its best formulation.

Whatever a model could keep prepared (keys stored padded) is prepared outside of the timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from shapes import Shape

Call = Callable[[], torch.Tensor]
FULL = "sdpa full width"


def tensors(shape: Shape, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """q, k, v and, for the full model, q and k as wide as the values."""
    torch.manual_seed(0)

    def fill(*size: int) -> torch.Tensor:
        # Normal numbers, drawn once and repeated: drawing gigabytes takes longer than all else.
        out = torch.empty(size, dtype=dtype, device=device)
        flat, block = out.view(-1), torch.randn(1 << 20, device=device).to(dtype)
        for at in range(0, flat.numel(), block.numel()):
            flat[at : at + block.numel()] = block[: flat.numel() - at]
        return out

    b, h, g, t = shape.batch, shape.heads, shape.kv_heads, shape.queries
    q, k = fill(b, h, t, shape.d_qk), fill(b, g, shape.keys, shape.d_qk)
    v = fill(b, g, shape.keys, shape.d_v)
    if shape.d_qk == shape.d_v:
        return q, k, v, q, k
    return q, k, v, fill(b, h, t, shape.d_v), fill(b, g, shape.keys, shape.d_v)


def _grouped_matmul(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    b, h, t, d = q.shape
    g = k.shape[1]
    scores = torch.matmul(q.view(b, g, h // g * t, d) * scale, k.mT)
    if mask is not None:
        scores = (scores.view(b, h, t, -1) + mask).view(scores.shape)
    return torch.matmul(torch.softmax(scores, -1), v).view(b, h, t, -1)


def _fold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    b, h, _, d = q.shape
    g = k.shape[1]
    out = F.scaled_dot_product_attention(q.view(b, g, h // g, d), k, v, scale=scale)
    return out.view(b, h, 1, -1)


@contextmanager
def _backend(name: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        yield


def _with_backend(name: str, call: Call) -> Call:
    def run() -> torch.Tensor:
        with _backend(name):
            return call()

    return run


def flex(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Call:
    """FlexAttention, compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if shape.kind == "prefill":
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, shape.queries, shape.keys, device=q.device
        )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    gqa = shape.heads != shape.kv_heads
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)


def _flash_package(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, decode: bool
) -> dict[str, Call]:
    """FlashAttention's own package where it is installed: its split-KV kernel in decode."""
    try:
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
    except ImportError:
        return {}
    attend = flash_attn_with_kvcache if decode else flash_attn_func
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    return {
        "full: flash-attn package": lambda: attend(
            *turned, softmax_scale=scale, causal=not decode
        ).transpose(1, 2)
    }


def rivals(
    shape: Shape, data: tuple[torch.Tensor, ...], scale: float, with_flex: bool, repeat: bool
) -> dict[str, Call]:
    """Name and call of each rival; those named ``full: …`` do the full model's work.

    Without ``repeat`` none repeats keys and values, for want of memory.
    """
    q, k, v, q_full, k_full = data
    decode = shape.kind == "decode"
    gqa = shape.heads != shape.kv_heads
    sdpa: Any = F.scaled_dot_product_attention
    group = shape.heads // shape.kv_heads
    calls: dict[str, Call] = {}

    def add(prefix: str, q: torch.Tensor, k: torch.Tensor) -> None:
        calls[f"{prefix}: enable_gqa"] = lambda: sdpa(
            q, k, v, is_causal=not decode, scale=scale, enable_gqa=gqa
        )
        if gqa and repeat:
            calls[f"{prefix}: repeated keys"] = lambda: sdpa(
                q,
                k.repeat_interleave(group, 1),
                v.repeat_interleave(group, 1),
                is_causal=not decode,
                scale=scale,
            )
        if gqa and decode:
            calls[f"{prefix}: group in rows"] = lambda: _fold(q, k, v, scale)

    add("full", q_full, k_full)
    if shape.d_qk != shape.d_v:
        add("thin", q, k)
    if shape.d_qk < shape.d_v:
        k_padded = F.pad(k, (0, shape.d_v - shape.d_qk))

        def padded() -> torch.Tensor:
            wide = F.pad(q, (0, shape.d_v - shape.d_qk))
            if decode and gqa:
                return _fold(wide, k_padded, v, scale)
            return sdpa(wide, k_padded, v, is_causal=not decode, scale=scale, enable_gqa=gqa)

        calls["padded: flash"] = padded
        if q.is_cuda:
            calls["padded: flash"] = _with_backend("FLASH_ATTENTION", padded)
            calls["padded: cudnn"] = _with_backend("CUDNN_ATTENTION", padded)
    scores = shape.batch * shape.heads * shape.queries * shape.keys * 4
    if scores <= 1 << 30:
        mask = None
        if not decode:
            mask = torch.full((shape.queries, shape.keys), -torch.inf, device=q.device)
            mask = mask.triu(1).to(q.dtype)
        calls["thin: grouped matmul"] = lambda: _grouped_matmul(q, k, v, scale, mask)
    if q.is_cuda:
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            calls[f"full: {name.lower()}"] = _with_backend(name, calls["full: enable_gqa"])
        if shape.d_qk != shape.d_v:
            thin = calls["thin: enable_gqa"]
            calls["thin: cudnn_attention"] = _with_backend("CUDNN_ATTENTION", thin)
        calls.update(_flash_package(q_full, k_full, v, scale, decode))
    if with_flex:
        calls["thin: flex"] = flex(shape, q, k, v, scale)
    return calls
