"""What a slim model saves against its original, from its shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gainlens.export.after_norm import map_weights


def savings_line(layers: Sequence[Any], full: int, size: int) -> str:
    """Widths of keys and values, bytes of the cache per token, weights of attention; one line.

    Args:
        layers: the thin attention modules.
        full: dimensions of a head of the original.
        size: bytes of a number in the cache; transformers keeps it in the type of the weights.
    """
    now = size * sum(a.n_kv_heads * (a.head_dim + a.value_dim) for a in layers)
    before = size * sum(a.n_kv_heads * 2 * full for a in layers)
    projections = [(a.q_proj, a.k_proj, a.v_proj, a.o_proj) for a in layers]
    weights = sum(p.weight.numel() for four in projections for p in four) + sum(
        map(map_weights, layers)
    )
    whole = sum(full * a.q_proj.in_features * 2 * (a.n_heads + a.n_kv_heads) for a in layers)
    keys = _span([a.head_dim for a in layers])
    values = _span([a.value_dim for a in layers])
    return (
        f"keys {keys} of {full} dimensions a head, values {values}; "
        f"cache {now:,} bytes a token instead of {before:,} ({_less(now, before)}); "
        f"attention weights {weights:,} instead of {whole:,} ({_less(weights, whole)})"
    )


def _span(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"


def _less(now: int, before: int) -> str:
    share = 1 - now / before
    return f"−{share:.0%}" if share >= 0 else f"+{-share:.0%}"
