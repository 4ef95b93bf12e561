"""The hash that ties a result to its model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Shaped

from gainlens.errors import UnsupportedModelError
from gainlens.model.attention_layouts import (
    LAYOUTS,
    AttentionLayout,
    bridge_weights,
    layer_tensors,
    lens_biases,
    lens_weights,
)
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.stored_weights import INSIDE, StoredWeights
from gainlens.model.text_config import text_config
from gainlens.model.wrapping import architecture_of

Tensors = dict[str, torch.Tensor]
FACTOR, ADDEND = -0x61C8864680B583EB, 0x2545F4914F6CDD1D
ROWS = 1 << 20
_KNOWN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Hexadecimal SHA-256 of the weights that determine a model's keys.

    It is the same for a ``TransformerBridge``, a ``HookedTransformer`` and the Hugging Face model
    of one checkpoint in the same floating point type. Folded weights (compatibility mode) give a
    different hash, since the gains of a folded model belong to different weights. It covers:

    - the attention weights and biases of every layer, in order;
    - all other weights of every layer (norms, MLP, adapters), independent of order, since it
      differs between the kinds of model; zero biases, which some kinds add, have no effect;
    - the signs of the embedding: TransformerLens multiplies Gemma's by sqrt(d_model).

    The last norm, the output head and position embeddings are excluded. Quantised weights are
    hashed as stored, offloaded weights as loaded. The hash of a model none of whose weights are in
    memory is computed once, since it takes reading all of them.

    Args:
        model: any of the three kinds, on any device.

    Raises:
        UnsupportedModelError: the layout of the attention weights is unknown, or they are not in
            memory.
    """
    inner = getattr(model, "original_model", model)
    known = _KNOWN.get(inner) if isinstance(inner, torch.nn.Module) else None
    if known is not None and not getattr(model, "compatibility_mode", False):
        return known
    digest = hashlib.sha256()
    embedding = _numbers(_embedding(model), "the embedding")
    digest.update(f"embedding {tuple(embedding.shape)}".encode())
    digest.update(np.packbits((embedding > 0).cpu().numpy()).tobytes())
    for number, (attention, rest) in enumerate(_layers(model)):
        for name, tensor in attention.items():
            plain = _wide(_numbers(tensor, f"layer {number}"))
            digest.update(f"{number} {name} {tuple(plain.shape)}".encode())
            digest.update(plain.numpy().tobytes())
        sums = [_unordered(_numbers(tensor, f"layer {number}")) for tensor in rest]
        digest.update(f"{number} {_total(sums):x}".encode())
    if isinstance(inner, torch.nn.Module) and all(p.is_meta for p in inner.parameters()):
        _KNOWN[inner] = digest.hexdigest()
    return digest.hexdigest()


def _layers(model: Any) -> Iterator[tuple[Tensors, Iterable[torch.Tensor]]]:
    """For each layer, the attention's tensors by name and all other tensors."""
    lens = hasattr(model, "blocks") and hasattr(model, "hook_dict")
    inner: Any = getattr(model, "original_model", None) if lens else model
    if lens and (inner is None or getattr(model, "compatibility_mode", False)):
        yield from (_lens_layer(block) for block in model.blocks)
        return
    layout = None
    if hasattr(inner, "config"):
        layout = LAYOUTS.get(architecture_of(inner))
    if layout is None and lens:
        yield from (_lens_layer(block) for block in model.blocks)
        return
    if layout is None and hasattr(inner, "named_parameters"):  # a family that nothing here reads
        yield {}, _held(inner).values()
        return
    if layout is None:
        raise UnsupportedModelError(
            f"model of type {type(inner).__name__} keeps its attention weights in a form that "
            "has no fingerprint"
        )
    config = text_config(inner.config)
    held = _held(inner)
    for layer in range(int(config.num_hidden_layers)):
        yield _layer(model if lens else None, layout, config, layer, held)


def _lens_layer(block: Any) -> tuple[Tensors, list[torch.Tensor]]:
    attention = block.attn
    q, k, v = lens_weights(attention)
    weights = AttentionWeights(q, k, v, attention.W_O.detach().permute(2, 0, 1))
    found = _in_order(weights)
    names = (*(f"{x}_bias" for x in "qkv"), "o_bias")
    for name, bias in zip(names, (*lens_biases(attention), _output_bias(attention)), strict=True):
        if bias is not None and bool(bias.any()):
            found[name] = bias.flatten()
    own = {f"attn.{u}{s}_{x}" for u in ("", "_") for s in "Wb" for x in "QKVO"}
    own |= {f"attn.{x}.{leaf}" for x in "qkvo" for leaf in ("weight", "bias")}
    rest = [
        parameter.detach()
        for name, parameter in block.named_parameters()
        if name.replace("._original_component", "") not in own
    ]
    return found, rest


def _output_bias(attention: Any) -> torch.Tensor | None:
    try:
        bias: Any = attention.b_O
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return bias.detach() if isinstance(bias, torch.Tensor) else None


def _layer(
    bridge: Any | None, layout: AttentionLayout, config: Any, layer: int, held: StoredWeights
) -> tuple[Tensors, Iterable[torch.Tensor]]:
    """A layer of a transformers model, or of one inside a bridge."""
    inside = layer_tensors(held, layout, layer)
    leaves = ("weight", "bias")
    names = {f"{part}.{leaf}" for part in (*layout.parts, layout.output) for leaf in leaves}
    # A bridge's own names for the projections: aliases, or parts of a joint matrix.
    aliases = {f"{part}.{leaf}" for part in ("q", "k", "v", "o", "qkv") for leaf in leaves}
    block = layout.attention.split("{}")[0] + f"{layer}."
    path = layout.attention.format(layer) + "."
    own = {path + n for n in names | (aliases if bridge is not None else set())}
    taken = {held.place(n) for n in own if n in held}
    rest = {
        held.place(name): name
        for name in held
        if name.startswith(block) and name not in own and held.place(name) not in taken
    }
    # Compared by place, since a bridge has further names for the same norms.
    norms = {held.place(n) for n in held if n.startswith(block) and "norm" in n}
    present = [held.like(path + n) for n in names if path + n in held]
    if all(tensor.is_floating_point() for tensor in present):
        if bridge is not None and not any(tensor.is_meta for tensor in present):
            weights = bridge_weights(bridge, layout, config, layer, held)
        else:
            weights = layout.read(inside, config)
        found = _in_order(weights)
        for name in ("q_bias", "k_bias", "v_bias", "o_bias"):
            bias = getattr(weights, name)
            if bias is not None and bool(bias.any()):
                found[name] = bias.flatten()
    else:  # quantised: hashed in the library's packed format
        found = {n: inside[n] for n in sorted(names & set(inside))}
    offset = layout.norm_offset
    others = (
        held[name].float() + offset if offset and at in norms else held[name]
        for at, name in rest.items()
    )
    return found, others


def _in_order(weights: AttentionWeights) -> Tensors:
    """q, k, v: ``[head * d_head, d_model]``; o: ``[d_model, head * d_head]``."""
    return {
        "q": weights.q.flatten(0, 1),
        "k": weights.k.flatten(0, 1),
        "v": weights.v.flatten(0, 1),
        "o": weights.o.flatten(1),
    }


def _held(inner: Any) -> StoredWeights:
    """Weights by transformers' names, also of those that adapters wrap."""
    return StoredWeights(inner, (INSIDE, ".base_layer"))


def _embedding(model: Any) -> Float[torch.Tensor, "vocab d_model"]:
    inner = getattr(model, "original_model", None)
    if inner is None and hasattr(model, "W_E"):
        weight: torch.Tensor = model.W_E
        return weight.detach()
    if inner is not None:
        weight = model.embed.weight
    elif hasattr(model, "get_input_embeddings"):
        weight = model.get_input_embeddings().weight
    else:
        raise UnsupportedModelError(
            f"model of type {type(model).__name__} keeps its attention weights in a form that "
            "has no fingerprint"
        )
    if weight.is_meta:
        held = _held(inner if inner is not None else model)
        alike = (n for n in held if held.like(n).shape == weight.shape)
        named = (n for n in alike if "emb" in n or "wte" in n)
        return next((held[name] for name in named), weight)
    return weight.detach()


def _numbers(tensor: Shaped[torch.Tensor, "..."], where: str) -> Shaped[torch.Tensor, "..."]:
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"the weights of {where} are not in memory (device meta), so the model has no "
            "fingerprint: load it without offloading"
        )
    return tensor


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().to("cpu")
    return (plain.float() if plain.is_floating_point() else plain).contiguous()


def _unordered(tensor: Shaped[torch.Tensor, "..."]) -> int:
    """A checksum of the values that does not depend on their order; 0 for all zeros."""
    total = 0
    for part in torch.split(_wide(tensor).flatten(), ROWS):
        if part.is_floating_point():
            part = (part + 0.0).view(torch.int32)  # -0.0 and 0.0 count as equal
        bits = part.to(torch.int64)
        total += int((bits * (bits * FACTOR + ADDEND)).sum())  # int64 overflow is intended
    return total % (1 << 64)


def _total(sums: list[int]) -> int:
    """The sum of the checksums, without a joint matrix that a bridge also keeps as two parts."""
    counted = [x for x in sums if x]
    pairs = {(a + b) % (1 << 64) for i, a in enumerate(counted) for b in counted[i + 1 :]}
    return sum(x for x in counted if x not in pairs) % (1 << 64)
