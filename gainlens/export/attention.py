"""The attention of a slim model. It uses the compiled kernel if that is installed.

Only this module imports the kernels package. The attention is registered with transformers as
``ATTENTION``; ``attn_implementation="eager"`` or ``"sdpa"`` selects one of transformers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch.nn.functional import pad, scaled_dot_product_attention

_compiled: Callable[..., torch.Tensor] | None = None
with suppress(ImportError):  # installed without the kernels
    from gainlens_kernels import sliced_attention as _compiled

ATTENTION = "gainlens_sliced"
KERNEL_WIDTH = 256
"""The widest head that the compiled kernel supports."""
FEW_QUERIES = 16
"""Up to this many query positions, matrix products are computed per group."""


def sliced_attention(
    q: Float[torch.Tensor, "batch head tq d_qk"],
    k: Float[torch.Tensor, "batch kv_head tk d_qk"],
    v: Float[torch.Tensor, "batch kv_head tk d_v"],
    *,
    scale: float,
    causal: bool = True,
    lengths: Int[torch.Tensor, " batch"] | None = None,
    starts: Int[torch.Tensor, " batch"] | None = None,
) -> Float[torch.Tensor, "batch head tq d_v"]:
    """Attention with keys and values of different widths; query head h reads key head h // group.

    Args:
        q, k, v: queries, keys and values.
        scale: factor of the query-key products.
        causal: the last query sees all keys, the one before all but the last, and so on.
        lengths: one past the last valid key of each row, for caches padded on the right; the last
            query is aligned with the last valid key.
        starts: the first valid key of each row, for texts padded on the left.

    Raises:
        ValueError: shapes that do not match (``SlicedAttentionError`` of the kernels).

    Example:
        >>> q, k, v = torch.randn(1, 8, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 64)
        >>> tuple(gl.sliced_attention(q, k, v, scale=64**-0.5).shape)
        (1, 8, 3, 64)
    """
    if _compiled is not None and max(q.shape[3], v.shape[3]) <= KERNEL_WIDTH:
        out: torch.Tensor = _compiled(
            q, k, v, scale=scale, causal=causal, lengths=lengths, starts=starts
        )
        return out
    mask = None
    if lengths is not None or starts is not None:
        mask = seen_keys(q.shape[2], k.shape[2], causal, lengths, starts, q.device)
    return plain_attention(q, k, v, scale=scale, causal=causal, mask=mask)


def seen_keys(
    tq: int,
    tk: int,
    causal: bool,
    lengths: Int[torch.Tensor, " batch"] | None,
    starts: Int[torch.Tensor, " batch"] | None,
    device: torch.device,
) -> Bool[torch.Tensor, "batch 1 tq tk"]:
    """True where a query may see a key; arguments as for ``sliced_attention``."""
    key = torch.arange(tk, device=device)
    end = torch.tensor([tk], device=device) if lengths is None else lengths
    begin = torch.zeros_like(end) if starts is None else starts
    rows = max(len(end), len(begin))
    last = end[:, None].expand(rows, tq)
    if causal:
        last = last - tq + 1 + torch.arange(tq, device=device)
    seen = (key < last[..., None]) & (key >= begin[:, None, None])
    return seen[:, None]


def plain_attention(
    q: Float[torch.Tensor, "batch head tq d_qk"],
    k: Float[torch.Tensor, "batch kv_head tk d_qk"],
    v: Float[torch.Tensor, "batch kv_head tk d_v"],
    *,
    scale: float,
    causal: bool = True,
    mask: Shaped[torch.Tensor, "_ _ tq tk"] | None = None,
    softcap: float | None = None,
) -> Float[torch.Tensor, "batch head tq d_v"]:
    """The same from PyTorch's own operators, in their fastest formulation for thin keys.

    Args:
        q, k, v, scale, causal: as for ``sliced_attention``.
        mask: True where a query may see a key, or numbers that are added to the scaled products;
            takes the place of ``causal``.
        softcap: bound of the scaled products; no fused operator of PyTorch has one.
    """
    batch, heads, tq, _ = q.shape
    kv_heads, tk = k.shape[1], k.shape[2]
    d_v = v.shape[3]
    if mask is None and causal and tq > 1 and tq != tk:
        ones = torch.ones(tq, tk, dtype=torch.bool, device=q.device)
        mask = ones.tril(diagonal=tk - tq)[None, None]
    few = tq <= FEW_QUERIES and q.device.type == "cpu" and not torch.compiler.is_compiling()
    if few or softcap is not None:
        grouped = q.reshape(batch, kv_heads, -1, q.shape[3])
        logits = _capped(torch.matmul(grouped, k.transpose(2, 3)) * scale, softcap)
        if mask is None and causal and tq > 1:
            mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)[None, None]
        if mask is not None:
            shown = logits.view(batch, heads, tq, tk)
            if mask.dtype == torch.bool:
                shown = shown.masked_fill(~mask, float("-inf"))
            else:
                shown = shown + mask
            logits = shown.view(logits.shape)
        weights = torch.softmax(logits, -1, dtype=_wide(v)).nan_to_num(0.0).to(v.dtype)
        return torch.matmul(weights, v).view(batch, heads, tq, d_v)
    # Unequal widths push PyTorch off its fast paths, so the narrower is padded with zeros.
    width = max(q.shape[3], d_v)
    if q.shape[3] < width:
        q, k = pad(q, (0, width - q.shape[3])), pad(k, (0, width - k.shape[3]))
    elif d_v < width:
        v = pad(v, (0, width - d_v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None and tq > 1,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out[..., :d_v]


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def attention_forward(
    module: torch.nn.Module,
    query: Float[torch.Tensor, "batch head tq d_qk"],
    key: Float[torch.Tensor, "batch kv_head tk d_qk"],
    value: Float[torch.Tensor, "batch kv_head tk d_v"],
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[torch.Tensor, "batch tq head d_v"], None]:
    """What transformers calls: ``[batch, pos, head, d_v]`` and no attention weights."""
    if (dropout or softcap is not None) and attention_mask is not None and attention_mask.ndim == 1:
        tq, tk = query.shape[2], key.shape[2]
        attention_mask = seen_keys(tq, tk, True, None, attention_mask, query.device)
    if dropout:
        out = eager_forward(module, query, key, value, attention_mask, scaling, dropout, softcap)[0]
        return out, None
    if softcap is not None and attention_mask is None:
        out = plain_attention(query, key, value, scale=scaling, softcap=softcap)
    elif attention_mask is None:
        out = sliced_attention(query, key, value, scale=scaling)
    elif attention_mask.ndim == 1:  # see sliced_mask
        out = sliced_attention(query, key, value, scale=scaling, starts=attention_mask)
    else:
        shown = attention_mask[..., : key.shape[2]]
        if shown.is_floating_point():  # a caller's own: it may hold any bias, not 0 and -inf alone
            shown = shown.to(query.dtype)
        out = plain_attention(query, key, value, scale=scaling, mask=shown, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def eager_forward(
    module: torch.nn.Module,
    query: Float[torch.Tensor, "batch head tq d_qk"],
    key: Float[torch.Tensor, "batch kv_head tk d_qk"],
    value: Float[torch.Tensor, "batch kv_head tk d_v"],
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[torch.Tensor, "batch tq head d_v"], Float[torch.Tensor, "batch head tq tk"]]:
    """Every attention weight in memory; for ``output_attentions`` and for dropout."""
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = _capped(torch.matmul(query, keys.transpose(2, 3)) * scaling, softcap)
    tq, tk = logits.shape[-2:]
    if attention_mask is None:
        ones = torch.ones(tq, tk, dtype=torch.bool, device=query.device)
        logits = logits.masked_fill(~ones.tril(tk - tq), float("-inf"))
    elif attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask[..., :tk], torch.finfo(logits.dtype).min)
    else:
        logits = logits + attention_mask[..., :tk]
    weights = torch.softmax(logits, -1, dtype=_wide(query)).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, values).transpose(1, 2).contiguous(), weights


def sliced_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Bool[torch.Tensor, "batch tk"] | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where the causal rule (last query sees all keys) says it all.

    Texts padded on the left give ``[batch]``, the first position of each; all else a boolean
    mask ``[batch, 1, query, key]``. A configuration with ``whole_masks`` gets numbers.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    if getattr(kwargs.get("config"), "whole_masks", False):
        numbers: torch.Tensor = eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            **kwargs,
        )
        return numbers

    plain = (
        allow_is_causal_skip
        and not torch.compiler.is_compiling()
        and not isinstance(q_offset, torch.Tensor)
        and q_offset + q_length == kv_offset + kv_length
        and (local_size is None or kv_offset + kv_length <= local_size)
    )
    if plain:
        if attention_mask is None:
            return None
        real = attention_mask[:, :kv_length]
        if bool(real.all()):
            return None
        starts = kv_length - real.sum(1)
        if real.shape[1] == kv_length and bool(
            (real == (torch.arange(kv_length, device=real.device) >= starts[:, None])).all()
        ):
            return starts
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )
    return mask


def register() -> None:
    """Make ``attn_implementation="gainlens_sliced"`` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sliced_mask)
