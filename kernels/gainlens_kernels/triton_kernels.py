"""Triton kernels for NVIDIA GPUs: prefill, and decode split over the keys.

Both are one program: a block of query rows against a range of keys. A row is (query position,
member of the head group), position major, so that a key is read once for its whole group. In
prefill a program sees all its keys and writes the output; in decode the keys of a row block are
shared out over several programs, whose partial results a second kernel merges.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
WIDEN = tl.constexpr(INTERPRETED)
LOG2E = 1.4426950408889634


@triton.jit
def _key_by_key(
    acc, p, allowed, v_base, v_stride, first, key_end, D_V: tl.constexpr, P_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Weighted values of a block with NaN or infinity among them: a product would hand 0 · NaN of
    # a key to the rows that may not see it. Slow and rare; a product of its own for it would cost
    # every block registers.
    c_v = tl.arange(0, P_V)
    index = tl.arange(0, BLOCK_N)
    for j in range(0, tl.minimum(key_end - first, BLOCK_N)):
        here = (index == j)[None, :]
        weight = tl.sum(tl.where(here, p, 0.0), 1)
        seen = tl.max((here & allowed).to(tl.int32), 1) > 0
        v = tl.load(v_base + (first + j) * v_stride + c_v, mask=c_v < D_V, other=0.0).to(tl.float32)
        acc += tl.where(seen[:, None], weight[:, None] * v[None, :], 0.0)
    return acc


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    # Triton's interpreter multiplies the bits of bfloat16, so there the operands are widened;
    # they were rounded before, which makes it the same product.
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    # Rounds to nearest. The interpreter cuts bfloat16 off instead, so there the rounding is added.
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _block_step(
    acc, m, norm, q, k_base, v_base, k_stride, v_stride, first, key_end, row_end, qk_scale,
    D_QK: tl.constexpr, D_V: tl.constexpr, P_QK: tl.constexpr, P_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys = first + tl.arange(0, BLOCK_N).to(tl.int64)
    c_qk = tl.arange(0, P_QK)
    c_v = tl.arange(0, P_V)
    k_ptr = k_base + keys[:, None] * k_stride + c_qk[None, :]
    v_ptr = v_base + keys[:, None] * v_stride + c_v[None, :]
    if MASKED:
        valid = keys < key_end
        k = tl.load(k_ptr, mask=valid[:, None] & (c_qk < D_QK)[None, :], other=0.0)
        v = tl.load(v_ptr, mask=valid[:, None] & (c_v < D_V)[None, :], other=0.0)
    else:
        if D_QK == P_QK:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=(c_qk < D_QK)[None, :], other=0.0)
        if D_V == P_V:  # noqa: SIM108
            v = tl.load(v_ptr)
        else:
            v = tl.load(v_ptr, mask=(c_v < D_V)[None, :], other=0.0)
    s = _dot(q, tl.trans(k), PRECISION) * qk_scale
    if MASKED:
        allowed = keys[None, :] < row_end[:, None]
        s = tl.where(allowed, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    # All scores minus infinity: any finite reference gives weights of zero.
    shift = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.where(m == top, 1.0, tl.exp2(m - shift))
    norm = norm * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if MASKED:
        wide = v.to(tl.float32)
        bad = (wide != wide) | (tl.abs(wide) == float("inf"))
        if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
            acc = _key_by_key(
                acc, p, allowed, v_base, v_stride, first, key_end, D_V, P_V, BLOCK_N
            )  # fmt: skip
        else:
            acc += _dot(_narrow(p, v.dtype), v, PRECISION)
    else:
        acc += _dot(_narrow(p, v.dtype), v, PRECISION)
    return acc, top, norm


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr, starts_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    kv_heads, group, tq, tk, splits, qk_scale,
    HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, P_QK: tl.constexpr, P_V: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(tq * group, BLOCK_M)
    # The last row block first: under a causal mask it is the longest.
    block = row_blocks - 1 - tl.program_id(0) % row_blocks
    pair = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < tq * group
    position = (rows // group).to(tl.int64)
    head = kv_head * group + rows % group
    c_qk = tl.arange(0, P_QK)
    c_v = tl.arange(0, P_V)
    q = tl.load(
        q_ptr + batch * q_b + (head * q_h + position * q_t)[:, None] + c_qk[None, :],
        mask=row_valid[:, None] & (c_qk < D_QK)[None, :],
        other=0.0,
    )

    begin = tl.zeros((), tl.int64)
    end = begin + tk
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), end)
    if HAS_STARTS:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + batch), 0), tk)
    row_end = tl.zeros((BLOCK_M,), tl.int64) + end
    whole_end = end  # up to here every row of the block sees every key
    block_end = end
    if CAUSAL:
        row_end = end - tq + position + 1
        whole_end = end - tq + (block * BLOCK_M) // group + 1
        last = tl.minimum(block * BLOCK_M + BLOCK_M, tq * group) - 1
        block_end = end - tq + last // group + 1
    has_keys = tl.minimum(row_end, end) > begin

    first = begin
    stop = block_end
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(block_end - begin, 0), splits), BLOCK_N) * BLOCK_N
        first = begin + split * share
        stop = tl.minimum(first + share, block_end)
    whole = first + tl.maximum(tl.minimum(stop, whole_end) - first, 0) // BLOCK_N * BLOCK_N

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, P_V), tl.float32)
    k_base = k_ptr + batch * k_b + kv_head * k_h
    v_base = v_ptr + batch * v_b + kv_head * v_h
    for at in range(first, whole, BLOCK_N):
        acc, m, norm = _block_step(
            acc, m, norm, q, k_base, v_base, k_t, v_t, at, end, row_end, qk_scale,
            D_QK, D_V, P_QK, P_V, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    seen_end = tl.minimum(row_end, stop)
    for at in range(whole, stop, BLOCK_N):
        acc, m, norm = _block_step(
            acc, m, norm, q, k_base, v_base, k_t, v_t, at, stop, seen_end, qk_scale,
            D_QK, D_V, P_QK, P_V, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    mask = row_valid[:, None] & (c_v < D_V)[None, :]
    if SPLIT:
        # Partial results [pair, split, row, 2 + D_V]: maximum, sum, unnormalised values.
        part = (pair.to(tl.int64) * splits + split) * tq * group + rows
        base = out_ptr + part * (2 + D_V)
        tl.store(base, m, mask=row_valid)
        tl.store(base + 1, norm, mask=row_valid)
        tl.store(base[:, None] + 2 + c_v[None, :], acc, mask=mask)
    else:
        # No key: zeros. Keys, but all scores minus infinity: NaN, as softmax has it.
        out = acc / tl.where(has_keys, norm, 1.0)[:, None]
        target = out_ptr + batch * o_b + (head * o_h + position * o_t)[:, None] + c_v[None, :]
        tl.store(target, _narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge(
    partial_ptr, out_ptr, lengths_ptr, starts_ptr, o_b, o_h, o_t, kv_heads, group, tq, tk, splits,
    HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
    D_V: tl.constexpr, P_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    position = (row // group).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64) * group + row % group
    columns = tl.arange(0, P_V)

    begin = tl.zeros((), tl.int64)
    end = begin + tk
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), end)
    if HAS_STARTS:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + batch), 0), tk)
    if CAUSAL:
        end = end - tq + position + 1

    m = tl.full((), float("-inf"), tl.float32)
    norm = tl.zeros((), tl.float32)
    acc = tl.zeros((P_V,), tl.float32)
    for split in range(splits):
        base = partial_ptr + ((pair.to(tl.int64) * splits + split) * tq * group + row) * (2 + D_V)
        m_part = tl.load(base)
        norm_part = tl.load(base + 1)
        part = tl.load(base + 2 + columns, mask=columns < D_V, other=0.0)
        top = tl.maximum(m, m_part)
        old = tl.where(m == top, 1.0, tl.exp2(m - top))
        new = tl.where(m_part == top, 1.0, tl.exp2(m_part - top))
        norm = norm * old + norm_part * new
        acc = acc * old + part * new
        m = top
    out = acc / tl.where(end > begin, norm, 1.0)
    target = out_ptr + batch * o_b + head * o_h + position * o_t + columns
    tl.store(target, _narrow(out, out_ptr.dtype.element_ty), mask=columns < D_V)


def _configs(rows: tuple[int, ...], keys: tuple[int, ...], stages: tuple[int, ...]) -> list[Any]:
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=8 if m >= 128 else 4, num_stages=s)
        for m in rows
        for n in keys
        for s in stages
    ]


# A few candidates each, tried once per pair of widths, dtype and mask. The last one is small
# enough in shared memory for float32 at a width of 256.
_KEY = ["D_QK", "D_V", "CAUSAL", "PRECISION"]
if INTERPRETED:
    _prefill = _decode = _attend
else:
    _prefill = triton.autotune(
        _configs((64, 128), (64,), (2, 3)) + _configs((32,), (32,), (1,)), key=_KEY
    )(_attend)
    _decode = triton.autotune(
        _configs((16,), (64, 128), (3, 4)) + _configs((16,), (32,), (1,)), key=_KEY
    )(_attend)


def _power(n: int) -> int:
    """Width of a tile that holds n columns: tiles of the matrix units start at 16."""
    return max(16, triton.next_power_of_2(n))


def _bounds(values: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    if values is None:
        return q  # never read
    return values.to(torch.int64).contiguous()


def plan_splits(pairs: int, rows: int, tk: int, processors: int) -> int:
    """Number of parts into which the keys of one KV head are split; 1 for prefill.

    Few rows give one block per KV head. The keys are split into parts of at least 256 until there
    are about four programs per multiprocessor, enough to keep its memory pipelines full.
    """
    if rows > 64:
        return 1
    blocks = pairs * -(-rows // 16)
    return max(1, min(-(-4 * processors // blocks), tk // 256))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
    splits: int | None = None,
) -> torch.Tensor:
    """Run the kernels on tensors that passed the checks.

    ``splits`` overrides the number of parts into which the keys are split.
    """
    batch, heads, tq, d_qk = q.shape
    kv_heads, tk, d_v = k.shape[1], k.shape[2], v.shape[3]
    group, pairs = heads // kv_heads, batch * kv_heads
    rows = tq * group
    out = torch.empty((batch, heads, tq, d_v), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    processors = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    )
    if splits is None:
        splits = plan_splits(pairs, rows, tk, processors)
    decode = rows <= 64
    bounds = (_bounds(lengths, q), _bounds(starts, q))
    masks = {
        "HAS_LENGTHS": lengths is not None,
        "HAS_STARTS": starts is not None,
        "CAUSAL": causal,
    }
    widths = {"D_QK": d_qk, "D_V": d_v, "P_QK": _power(d_qk), "P_V": _power(d_v)}
    # Tensor cores round float32 to 10 bits of mantissa unless told not to.
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    target = out
    if splits > 1:
        shape = (pairs, splits, rows, 2 + d_v)
        target = torch.empty(shape, dtype=torch.float32, device=q.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return (pairs * triton.cdiv(rows, meta["BLOCK_M"]), splits)

    blocks = {"BLOCK_M": 16, "BLOCK_N": 32} if INTERPRETED else {}
    kernel = _decode if decode else _prefill
    kernel[grid](
        q, k, v, target, *bounds,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        kv_heads, group, tq, tk, splits, scale * LOG2E,
        **masks, **widths, SPLIT=splits > 1, PRECISION=precision, **blocks,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows, pairs)](
            target, out, *bounds, *out.stride()[:3], kv_heads, group, tq, tk, splits,
            **masks, D_V=d_v, P_V=_power(d_v),
        )  # fmt: skip
    return out
