"""The cosines and sines that a model uses for a text of any length, from its own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gainlens.errors import UnsupportedModelError

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines as stored by the model, ``[batch, pos, width]``, including any scale."""


def read_tables(model: Any, run: Callable[[], None], n_layers: int) -> tuple[Any, ...]:
    """For each layer, a function from a length to the model's cosines and sines, or None.

    Args:
        model: a TransformerBridge or HookedTransformer.
        run: runs the model once on a few tokens.
        n_layers: number of layers.
    """
    inside = getattr(model, "original_model", None)
    if inside is None:
        return tuple(_hooked_table(model.blocks[layer].attn) for layer in range(n_layers))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
    given: dict[int, Any] = {}

    def called(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, dict(kwargs), output))

    def caught(module: Any, args: Any, kwargs: Any, *, layer: int) -> None:
        given[layer] = kwargs.get("position_embeddings")

    handles = [
        module.register_forward_hook(called, with_kwargs=True)
        for module in inside.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]
    for layer in range(n_layers):
        handles.append(
            model.blocks[layer].attn.register_forward_pre_hook(
                partial(caught, layer=layer), with_kwargs=True
            )
        )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_matching(calls, given.get(layer)) for layer in range(n_layers))


def _matching(calls: list[Any], angles: Any) -> Callable[[int], Angles] | None:
    """The call that produced ``angles``, as a function of the length."""
    if not isinstance(angles, tuple):
        return None
    for module, args, kwargs, output in calls:
        same = isinstance(output, tuple) and output[0].shape == angles[0].shape
        if same and all(torch.equal(a, b) for a, b in zip(output, angles, strict=True)):
            return partial(_replay, module, args, kwargs)
    return None


def _replay(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], n_pos: int) -> Angles:
    """A rotary module's output for a text of ``n_pos`` tokens; the module is not changed."""

    def renewed(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return torch.arange(n_pos, device=value.device)[None]
        return value

    given = tuple(renewed(a) for a in args)
    named = {name: renewed(value) for name, value in kwargs.items()}
    # A copy, since some modules remember the longest text seen.
    with torch.no_grad():
        cos, sin = copy.deepcopy(module)(*given, **named)
    return cos[0], sin[0]


def _hooked_table(attention: Any) -> Callable[[int], Angles] | None:
    if not hasattr(attention, "rotary_cos"):
        return None

    def table(n_pos: int) -> Angles:
        cfg, cos, sin = attention.cfg, attention.rotary_cos, attention.rotary_sin
        if getattr(cfg, "use_dynamic_ntk_rope", False):
            raise UnsupportedModelError(
                "this HookedTransformer's rotary base depends on the length (dynamic NTK) and "
                "can't be read outside a forward pass"
            )
        if n_pos > len(cos):
            sin, cos = attention.calculate_sin_cos_rotary(
                cfg.rotary_dim, n_pos, base=attention._rotary_base(), dtype=cfg.dtype
            )
        return cos[:n_pos], sin[:n_pos]

    return table
