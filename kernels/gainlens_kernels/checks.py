"""Checks of the arguments of the operator, with error messages."""

from __future__ import annotations

from numbers import Real

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_WIDTH = 256


class SlicedAttentionError(ValueError):
    """An argument of ``sliced_attention`` cannot be used; the message names it."""


def _shape(x: torch.Tensor) -> str:
    return str(list(x.shape))


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ``SlicedAttentionError`` unless shapes, dtypes and devices of q, k and v match.

    Shapes: q ``[batch, heads, tq, d_qk]``, k ``[batch, kv_heads, tk, d_qk]``,
    v ``[batch, kv_heads, tk, d_v]``.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise SlicedAttentionError(f"{name} is a {type(x).__name__}, expected a tensor")
        if x.layout is not torch.strided or x.is_nested:
            kind = "is a nested tensor" if x.is_nested else f"has layout {x.layout}"
            raise SlicedAttentionError(f"{name} {kind}, expected a strided tensor")
        if x.dim() != 4:
            axes = "[batch, heads, tq, d_qk]" if name == "q" else "[batch, kv_heads, tk, width]"
            raise SlicedAttentionError(f"{name} has shape {_shape(x)}, expected 4 axes {axes}")
    if q.dtype not in DTYPES:
        raise SlicedAttentionError(
            f"q has dtype {q.dtype}, expected float32, bfloat16, float16 (or float64, slow)"
        )
    batch, heads, _, d_qk = q.shape
    k_batch, kv_heads, tk, k_width = k.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise SlicedAttentionError(f"{name} has dtype {x.dtype}, expected {q.dtype} like q")
        if x.device != q.device:
            raise SlicedAttentionError(f"{name} is on {x.device}, expected {q.device} like q")
    if k_batch != batch:
        raise SlicedAttentionError(f"k has batch size {k_batch}, expected {batch} like q")
    if k_width != d_qk:
        raise SlicedAttentionError(f"k has width {k_width}, expected d_qk = {d_qk} like q")
    if v.shape[0] != batch or v.shape[1] != kv_heads or v.shape[2] != tk:
        raise SlicedAttentionError(
            f"v has shape {_shape(v)}, expected [{batch}, {kv_heads}, {tk}, d_v] to match "
            f"k {_shape(k)}"
        )
    if tk == 0:
        raise SlicedAttentionError("k has no keys (tk = 0), expected at least one")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise SlicedAttentionError(
            f"q has {heads} heads and k has {kv_heads}, expected a positive multiple"
        )
    for name, axis, width in (("q", "d_qk", d_qk), ("v", "d_v", v.shape[3])):
        if not 1 <= width <= MAX_WIDTH:
            raise SlicedAttentionError(
                f"{name} has {axis} = {width}, expected a width from 1 to {MAX_WIDTH}"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] != 1:
            raise SlicedAttentionError(
                f"{name} has stride {x.stride(3)} along its last axis, expected 1 "
                f"(call {name}.contiguous())"
            )


def check_scale(scale: float) -> float:
    """Return the scale as a float, or raise if it is not a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Real)):
        raise SlicedAttentionError(f"scale is {scale!r}, expected a finite number")
    if not abs(scale) <= 1e38:  # an integer may be too large to be made a float
        raise SlicedAttentionError(f"scale is {scale!r}, expected a finite float32 number")
    return float(scale)


def check_bounds(name: str, bounds: torch.Tensor | None, q: torch.Tensor) -> None:
    """Raise unless ``bounds`` is None or one integer per batch row on the device of q."""
    if bounds is None:
        return
    if not isinstance(bounds, torch.Tensor):
        raise SlicedAttentionError(
            f"{name} is a {type(bounds).__name__}, expected an integer tensor [batch]"
        )
    if bounds.dtype not in (torch.int64, torch.int32):
        raise SlicedAttentionError(f"{name} has dtype {bounds.dtype}, expected int64 or int32")
    if bounds.dim() != 1 or bounds.shape[0] != q.shape[0]:
        raise SlicedAttentionError(
            f"{name} has shape {_shape(bounds)}, expected [{q.shape[0]}], one per batch row"
        )
    if bounds.device != q.device:
        raise SlicedAttentionError(f"{name} is on {bounds.device}, expected {q.device} like q")


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> float:
    """Check everything that needs no tensor values; return the scale as a float.

    Shapes as for ``check_tensors``; ``lengths`` and ``starts`` are ``[batch]``.
    """
    check_tensors(q, k, v)
    if lengths is not None or starts is not None:
        check_bounds("lengths", lengths, q)
        check_bounds("starts", starts, q)
    return check_scale(scale)


def check_gradient(grad: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> None:
    """Raise unless ``grad`` has the output's shape ``[batch, heads, tq, d_v]`` and device."""
    expected = [*q.shape[:3], v.shape[3]]
    if list(grad.shape) != expected or grad.device != q.device:
        raise SlicedAttentionError(
            f"grad has shape {_shape(grad)} on {grad.device}, expected {expected} on {q.device}"
        )


def own_bounds(bounds: torch.Tensor | None) -> torch.Tensor | None:
    """A private contiguous int64 copy of ``[batch]`` integers on the CPU.

    The checked values are then the values in use, even if another thread changes the original.
    """
    if bounds is None:
        return None
    return bounds.resolve_neg().to(torch.int64, copy=True).contiguous()


def check_bound_values(name: str, bounds: torch.Tensor | None, tk: int) -> None:
    """Raise unless every value lies in [0, tk]. It reads the values, so only for the CPU."""
    if bounds is None:
        return
    for row, value in enumerate(bounds.tolist()):
        if not 0 <= value <= tk:
            raise SlicedAttentionError(
                f"{name}[{row}] is {value}, expected a value from 0 to tk = {tk}"
            )
