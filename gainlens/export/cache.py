"""A key-value cache layer that grows in place.

The cache layer of transformers copies the whole cache for every token, which costs as much memory
traffic as reading it twice. This layer allocates spare room and writes behind the last token. It
returns views whose last axis is contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

SPARE = 256
"""Minimum spare tokens of a new buffer; long buffers get a quarter of their length."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """``DynamicLayer`` with spare room; falls back on it for gradients and while compiling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys: Any
        self.values: Any
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self,
        key_states: Float[torch.Tensor, "batch kv_head new d_key"],
        value_states: Float[torch.Tensor, "batch kv_head new d_value"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[torch.Tensor, "..."], Float[torch.Tensor, "..."]]:
        """Append and return everything so far."""
        if torch.compiler.is_compiling() or key_states.requires_grad or value_states.requires_grad:
            self._buffers = self._views = None
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return grown
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        old = self.get_seq_length()
        # Cropping and reordering replace self.keys, and with it the claim on the buffer's tail.
        mine = self._views is not None and self._views[0] is self.keys
        if (
            not mine
            or self._buffers is None
            or old + new > self._buffers[0].shape[-2]
            # Made under inference_mode, it may not be written outside.
            or (self._buffers[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            room = old + new + max(SPARE, (old + new) // 4)
            self._buffers = (
                _room(self.keys, key_states, old, room),
                _room(self.values, value_states, old, room),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, old : old + new] = states
        self.keys, self.values = (b[:, :, : old + new] for b in self._buffers)
        self._views = (self.keys, self.values)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = self._views = None
        super().reset()


def _room(
    before: torch.Tensor, like: torch.Tensor, old: int, room: int
) -> Float[torch.Tensor, "batch kv_head room d"]:
    batch, heads, _, width = like.shape
    buffer = like.new_empty(batch, heads, room, width)
    if old:
        buffer[:, :, :old] = before
    return buffer


def prepare_layer(cache: Any, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Make ``layer`` of a cache fit thin keys, before it is written to.

    A fresh, plain ``DynamicCache`` keeps it in a ``GrowingLayer``. A static cache that was made
    from the configuration (chunked prefill does so) has the full head's widths, and is made anew
    while it is empty.

    Args:
        cache: of transformers.
        layer: its number.
        keys, values: that will be written, ``[batch, kv_head, pos, width]``.
    """
    if torch.compiler.is_compiling():
        return
    use_growing_layer(cache, layer)
    held = getattr(cache, "layers", ())
    if layer < len(held) and isinstance(held[layer], StaticLayer):
        found = held[layer]
        if found.is_initialized and not int(found.get_seq_length()):
            widths = (found.keys.shape[-1], found.values.shape[-1])
            if widths != (keys.shape[-1], values.shape[-1]):
                found.lazy_initialization(keys, values)


def use_growing_layer(cache: Any, layer: int) -> None:
    """Let a fresh, plain ``DynamicCache`` keep ``layer`` in a ``GrowingLayer``."""
    if type(cache) is not DynamicCache or torch.compiler.is_compiling():
        return
    if layer < len(cache.layers):
        found = cache.layers[layer]
        if type(found) is DynamicLayer and not found.is_initialized:
            cache.layers[layer] = GrowingLayer()
    elif getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
