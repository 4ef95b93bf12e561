"""The plug-in's GPU attention without a GPU: Triton's interpreter, and compilation for one.

Called by ``benchmarks/engines_vllm_plugin.py`` in vLLM's environment as
``python engines_vllm_triton.py JOB.json RESULT.json``; the job is empty. The kernels that write and
read vLLM's cache run in the interpreter against float64 attention, over pages, ragged batches and
windows. With ``TRITON_INTERPRET=0`` they are compiled for a GPU, which needs none.
``engines_vllm.py`` imports this module to serve a folder in the interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from triton.backends import backends

# vLLM switches Triton off where no driver is found. The interpreter needs none.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore

PAGE = 16
WIDTHS = ((16, 64), (24, 64), (40, 64), (48, 64), (64, 128), (32, 32), (56, 48))
"""Cached widths of keys and of values."""


def main() -> None:
    """Run the kernels, or compile them, and write the answer."""
    if os.environ["TRITON_INTERPRET"] == "1":
        answer: dict[str, Any] = {"kernels": [kernels(*widths) for widths in WIDTHS]}
        answer["grouped"] = kernels(24, 64, heads=10, kv_heads=2)
        answer["window"] = kernels(40, 64, window=7)
    else:
        answer = {"compiled": [compiled(*widths, 90) for widths in WIDTHS]}
    Path(sys.argv[2]).write_text(json.dumps(answer))


def kernels(
    d_key: int, d_value: int, heads: int = 4, kv_heads: int = 2, window: int | None = None
) -> dict[str, Any]:
    """Largest error of prefill and decode through the pages, float32 against float64."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash_diffkv,
    )
    from vllm.v1.attention.ops.triton_unified_attention_diffkv import unified_attention_diffkv

    torch.manual_seed(0)
    lengths, new = [23, 9, 40], {"prefill": [23, 4, 17], "decode": [1, 1, 1]}
    scale, one = 0.125, torch.ones(1)
    n_pages = sum(-(-n // PAGE) for n in lengths)
    pages, table, given = torch.randperm(n_pages), torch.zeros(3, 3, dtype=torch.int32), 0
    for row, n in enumerate(lengths):
        count = -(-n // PAGE)
        table[row, :count] = pages[given : given + count]
        given += count
    cache = torch.zeros(n_pages, kv_heads, PAGE, d_key + d_value)  # as vLLM's: block, head, token
    k = [torch.randn(n, kv_heads, d_key) for n in lengths]
    v = [torch.randn(n, kv_heads, d_value) for n in lengths]
    slots = [
        table[row, torch.arange(n) // PAGE].long() * PAGE + torch.arange(n) % PAGE
        for row, n in enumerate(lengths)
    ]
    triton_reshape_and_cache_flash_diffkv(
        torch.cat(k), torch.cat(v), cache.transpose(1, 2), torch.cat(slots), "auto", one, one
    )
    view, errors = cache.transpose(1, 2), {}
    for what, counts in new.items():
        q = torch.randn(sum(counts), heads, d_key)
        out = torch.zeros(sum(counts), heads, d_value)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        split = {}
        if what == "decode":  # few texts: the keys are divided over programs as well
            padded = 1 << (d_value - 1).bit_length()
            split = {
                "seq_threshold_3D": 8,
                "num_par_softmax_segments": 16,
                "softmax_segm_output": torch.zeros(8, heads, 16, padded),
                "softmax_segm_max": torch.zeros(8, heads, 16),
                "softmax_segm_expsum": torch.zeros(8, heads, 16),
            }
        unified_attention_diffkv(
            q=q,
            k=view[..., :d_key],
            v=view[..., d_key:],
            out=out,
            cu_seqlens_q=starts,
            seqused_k=torch.tensor(lengths, dtype=torch.int32),
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            block_table=table,
            softcap=0,
            max_seqlen_q=max(counts),
            **split,
        )
        wanted = [
            oracle(q[starts[row] : starts[row + 1]], k[row], v[row], scale, window)
            for row in range(len(lengths))
        ]
        errors[what] = float((out - torch.cat(wanted)).abs().max())
    return {"keys": d_key, "values": d_value, "heads": [heads, kv_heads], "errors": errors}


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Plain attention in float64; the last query sees all keys."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("thd,shd->hts", q.double(), k) * scale
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    masked = (distance < 0) | (distance >= (window or 1 << 30))
    weights = logits.masked_fill(masked, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def compiled(d_key: int, d_value: int, capability: int) -> dict[str, Any]:
    """Compile the attention for bfloat16 on a GPU of that capability; bytes of the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from vllm.v1.attention.ops import triton_unified_attention_diffkv as ops

    backends.pop("cpu", None)  # it compiles nothing
    source = ops.kernel_unified_attention_diffkv
    constants = {
        "num_query_heads": 4,
        "num_queries_per_kv": 2,
        "BLOCK_SIZE": PAGE,
        "TILE_SIZE": 32,
        "HEAD_SIZE_QK": d_key,
        "HEAD_SIZE_QK_PADDED": 1 << (d_key - 1).bit_length(),
        "HEAD_SIZE_V": d_value,
        "HEAD_SIZE_V_PADDED": 1 << (d_value - 1).bit_length(),
        "USE_ALIBI_SLOPES": False,
        "USE_ALIBI_SQRT": False,
        "USE_SOFTCAP": False,
        "USE_SINKS": False,
        "USE_Q_SCALE": False,
        "USE_KV_SCALES": False,
        "SLIDING_WINDOW": 0,
        "stride_k_cache_3": 1,
        "stride_v_cache_3": 1,
        "BLOCK_Q": 8,
        "BLOCK_M": 16,
        "NUM_SEGMENTS_PER_SEQ": 1,
        "IS_3D": False,
    }
    signature = {}
    for name in source.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            whole = name in ("block_tables_ptr", "seq_lens_ptr", "query_start_len_ptr")
            kind = "i32" if whole else "fp32" if name.startswith(("segm", "alibi")) else "bf16"
            signature[name] = f"*{kind}"
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i64"
        if name in ("num_seqs",):
            signature[name] = "i32"
    binary = triton.compile(
        ASTSource(
            source, signature, {(source.arg_names.index(n),): c for n, c in constants.items()}
        ),
        target=GPUTarget("cuda", capability, 32),
    )
    return {
        "keys": d_key,
        "values": d_value,
        "target": f"sm_{capability}",
        "cubin_bytes": len(binary.asm["cubin"]),
        "shared_bytes": int(binary.metadata.shared),
    }


if __name__ == "__main__":
    main()
