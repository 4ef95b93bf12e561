"""What a slim model saves against its original, from its shapes alone."""

from __future__ import annotations

from typing import Any

from gainlens.export.after_norm import map_weights


def savings_line(model: Any) -> str:
    """Widths of keys and values, bytes of the cache per token, weights of attention; one line.

    The cache is counted in the type of the weights, as transformers keeps it.

    Args:
        model: a slim model.
    """
    from gainlens.export.modeling import family_of
    from gainlens.export.slim_attention import SlimAttention

    layers = [m for m in model.modules() if isinstance(m, SlimAttention)]
    if not layers:
        return ""
    full = family_of(model.config).d_head(model.config)
    size = next(model.parameters()).element_size()
    now = size * sum(a.n_kv_heads * (a.head_dim + a.value_dim) for a in layers)
    before = size * sum(a.n_kv_heads * 2 * full for a in layers)
    projections = [(a.q_proj, a.k_proj, a.v_proj, a.o_proj) for a in layers]
    weights = sum(p.weight.numel() for four in projections for p in four) + map_weights(model)
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
