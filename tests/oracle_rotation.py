"""Rotation of keys by complex multiplication, and keys edited inside transformers' attention."""

from __future__ import annotations

from contextlib import contextmanager

import torch


def rotate(x, frequencies, pairing, *, inverse=False):
    """Turn ``[batch, pos, head, d_head]`` at positions 0, 1, … in double precision."""
    n = len(frequencies)
    turning = x[..., : 2 * n].double()
    if pairing == "half":
        pairs = torch.complex(turning[..., :n], turning[..., n:])
    else:
        pairs = torch.complex(turning[..., ::2], turning[..., 1::2])
    angle = torch.arange(x.shape[1]).double()[:, None] * frequencies.double()
    turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle)
    new = pairs * turn[None, :, None]
    if pairing == "half":
        flat = torch.cat([new.real, new.imag], -1)
    else:
        flat = torch.stack([new.real, new.imag], -1).flatten(-2)
    return torch.cat([flat.to(x.dtype), x[..., 2 * n :]], -1)


@contextmanager
def edited_keys(model, edit):
    """Run a transformers model with ``edit(key, layer)`` inside its attention function.

    ``key`` is ``[batch, kv_head, pos, d_head]`` after every norm and rotation, cached keys
    included.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, attention_mask, **kwargs):
        key = edit(key, module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("edited_keys", attend)
    AttentionMaskInterface.register("edited_keys", sdpa_mask)
    before = model.config._attn_implementation
    older = [module for module in model.modules() if hasattr(module, "_attn")]  # GPT-J
    for module in older:
        module._attn = _edited(module, edit)
    if not older:
        model.config._attn_implementation = "edited_keys"
    try:
        yield model
    finally:
        model.config._attn_implementation = before
        for module in older:
            del module._attn


def _edited(module, edit):
    plain = module._attn
    return lambda q, k, *args, **kwargs: plain(q, edit(k, module.layer_idx), *args, **kwargs)
