"""Read and write the attention weights of each architecture.

A new family is one row of ``LAYOUTS``. It names the parameters and which of their rows hold the
queries, keys and values of each head. Reading, writing and training all use this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gainlens.errors import UnsupportedModelError
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.stored_weights import StoredWeights

Tensors = Mapping[str, torch.Tensor]
"""A layer's attention tensors by name, relative to the attention module."""
Form = Literal["separate", "stacked", "by_head", "by_group"]
"""``separate``: one matrix each for q, k and v. The other forms have one joint matrix: ``stacked``
holds all queries, then all keys, then all values; ``by_head`` holds query, key and value of head 0,
then of head 1, …; ``by_group`` holds a group's query heads, then its key head and value head."""


@dataclass(frozen=True)
class AttentionLayout:
    """The attention layout of one architecture: a row of ``LAYOUTS``.

    Attributes:
        attention: path of layer ``{}``'s attention module.
        parts: names of the projections: three separate ones, or one joint one.
        output: name of the output projection.
        form: the layout of the projections, or a function from the configuration to it.
        columns: whether a weight is stored ``[in, out]`` (GPT-2's Conv1D).
        norms: names of the norms on queries and keys, where the configuration has them.
        norm_offset: added to the weights of all the layer's norms at run time.
    """

    attention: str
    parts: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    form: Form | Callable[[Any], Form] = "separate"
    columns: bool = False
    norms: tuple[str, ...] = ()
    norm_offset: float = 0.0

    def sizes(self, config: Any) -> tuple[int, int, int]:
        """Numbers of query heads and key heads, and the width of a head."""
        n_heads = int(config.num_attention_heads)
        n_kv = getattr(config, "num_key_value_heads", None) or n_heads
        if hasattr(config, "new_decoder_architecture"):  # Falcon, also as a slim model
            grouped = config.new_decoder_architecture
            n_kv = config.num_kv_heads if grouped else 1 if config.multi_query else n_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        return n_heads, int(n_kv), int(d_head)

    def rows(self, config: Any) -> dict[str, Int[torch.Tensor, "head d_head"]]:
        """For each head of q, k and v, its rows in the projection (columns for a Conv1D)."""
        n, kv, d = self.sizes(config)
        form = self.form(config) if callable(self.form) else self.form
        if form == "separate":
            return {
                x: torch.arange(h * d).reshape(h, d)
                for x, h in zip("qkv", (n, kv, kv), strict=True)
            }
        grid = torch.arange((n + 2 * kv) * d).reshape(-1, d)
        if form == "stacked":
            return dict(zip("qkv", torch.split(grid, [n, kv, kv]), strict=True))
        group = 1 if form == "by_head" else n // kv
        by_group = grid.reshape(kv, group + 2, d)
        q, k, v = torch.split(by_group, [group, 1, 1], 1)
        return {"q": q.reshape(n, d), "k": k.reshape(kv, d), "v": v.reshape(kv, d)}

    def part(self, letter: str) -> str:
        """The projection that holds the queries (``q``), keys (``k``) or values (``v``)."""
        return self.parts["qkv".index(letter)] if len(self.parts) == 3 else self.parts[0]

    @property
    def joint(self) -> bool:
        """Whether one matrix holds queries, keys and values."""
        return len(self.parts) == 1

    def read(self, tensors: Tensors, config: Any) -> AttentionWeights:
        """One layer's weights, separated by head; they may be views of ``tensors``."""
        found: dict[str, Any] = {}
        for letter, rows in self.rows(config).items():
            weight = tensors[f"{self.part(letter)}.weight"]
            found[letter] = (weight.T if self.columns else weight)[rows.to(weight.device)]
            bias = tensors.get(f"{self.part(letter)}.bias")
            found[f"{letter}_bias"] = None if bias is None else bias[rows.to(bias.device)]
        n_heads, n_kv, _ = self.sizes(config)
        out = tensors[f"{self.output}.weight"]
        out = out.T if self.columns else out
        norms = {}
        for letter, name in zip("qk", self.norms, strict=False):
            width = found[letter].shape[1]
            factor = _factors(tensors, name)
            if factor is None:
                continue
            exact = factor if self.norm_offset == 0 else factor.float() + self.norm_offset
            # One set for all heads, or one for each.
            norms[f"{letter}_norm"] = (
                exact.expand(n_kv, -1) if exact.numel() == width else exact.reshape(-1, width)
            )
            if (bias := tensors.get(f"{name}.bias")) is not None:
                norms[f"{letter}_norm_bias"] = bias.expand(n_kv, -1)
        return AttentionWeights(
            **found,
            **norms,
            o=out.reshape(out.shape[0], n_heads, -1),
            o_bias=tensors.get(f"{self.output}.bias"),
        )

    def write(self, tensors: Tensors, weights: AttentionWeights, config: Any) -> dict[str, Any]:
        """The inverse of ``read``: new tensors with the names and shapes of ``tensors``.

        Norms are left unchanged.
        """
        new = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for letter, rows in self.rows(config).items():
            weight = new[f"{self.part(letter)}.weight"]
            table = weight.T if self.columns else weight
            table[rows.to(weight.device)] = getattr(weights, letter).to(weight)
            bias, given = new.get(f"{self.part(letter)}.bias"), getattr(weights, f"{letter}_bias")
            if bias is not None and given is not None:
                bias[rows.to(bias.device)] = given.to(bias)
        out = new[f"{self.output}.weight"]
        flat = weights.o.flatten(1)
        out.copy_(flat.T if self.columns else flat)
        if weights.o_bias is not None and f"{self.output}.bias" in new:
            new[f"{self.output}.bias"].copy_(weights.o_bias)
        return new


def _factors(tensors: Tensors, name: str) -> torch.Tensor | None:
    """Factors of a norm: of one module, or of one per head."""
    one = tensors.get(f"{name}.weight")
    if one is not None:
        return one
    heads = sum(key.startswith(f"{name}.norms.") for key in tensors)
    return torch.cat([tensors[f"{name}.norms.{n}.weight"] for n in range(heads)]) if heads else None


def _falcon(config: Any) -> Form:
    if config.new_decoder_architecture:
        return "by_group"
    return "stacked" if config.multi_query else "by_head"


_LLAMA = AttentionLayout("model.layers.{}.self_attn")
_NORMED = AttentionLayout("model.layers.{}.self_attn", norms=("q_norm", "k_norm"))
_GEMMA = AttentionLayout("model.layers.{}.self_attn", norm_offset=1.0)
_LAYER_NORMED = AttentionLayout("model.layers.{}.self_attn", norms=("q_layernorm", "k_layernorm"))
_PHI = replace(_LAYER_NORMED, output="dense")

LAYOUTS: dict[str, AttentionLayout] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _NORMED,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": AttentionLayout(
        "model.layers.{}.self_attn", norms=("q_norm", "k_norm"), norm_offset=1.0
    ),
    "Olmo2ForCausalLM": _NORMED,  # over all heads at once
    "GraniteForCausalLM": _LLAMA,
    "Starcoder2ForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": _LAYER_NORMED,
    "CohereForCausalLM": _NORMED,
    "Cohere2ForCausalLM": _LLAMA,
    "GlmForCausalLM": _LLAMA,
    "Glm4ForCausalLM": _LLAMA,
    "Ernie4_5ForCausalLM": _LLAMA,
    "PhiForCausalLM": _PHI,
    "Phi3ForCausalLM": AttentionLayout("model.layers.{}.self_attn", ("qkv_proj",), form="stacked"),
    "OPTForCausalLM": AttentionLayout("model.decoder.layers.{}.self_attn", output="out_proj"),
    "GPTNeoXForCausalLM": AttentionLayout(
        "gpt_neox.layers.{}.attention", ("query_key_value",), "dense", "by_head"
    ),
    "BloomForCausalLM": AttentionLayout(
        "transformer.h.{}.self_attention", ("query_key_value",), "dense", "by_head"
    ),
    "FalconForCausalLM": AttentionLayout(
        "transformer.h.{}.self_attention", ("query_key_value",), "dense", _falcon
    ),
    "GPT2LMHeadModel": AttentionLayout(
        "transformer.h.{}.attn", ("c_attn",), "c_proj", "stacked", columns=True
    ),
    "GPTJForCausalLM": AttentionLayout("transformer.h.{}.attn", output="out_proj"),
    "GPTNeoForCausalLM": AttentionLayout("transformer.h.{}.attn.attention", output="out_proj"),
    "MptForCausalLM": AttentionLayout(
        "transformer.blocks.{}.attn", ("Wqkv",), "out_proj", "stacked"
    ),
}


def layout_of(architecture: str) -> AttentionLayout:
    """The layout of an architecture.

    Raises:
        UnsupportedModelError: the architecture has no row in ``LAYOUTS``.
    """
    if architecture not in LAYOUTS:
        raise UnsupportedModelError(
            f"the layout of {architecture}'s attention weights is not known; known are "
            f"{', '.join(LAYOUTS)}"
        )
    return LAYOUTS[architecture]


def plain_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of a transformers model, or of the one in a bridge, by transformers' names.

    Those that are not in memory are on the device ``meta``: see ``StoredWeights``.
    """
    held = StoredWeights(model)
    return {name: held.like(name) for name in held}


def layer_tensors(tensors: Tensors, layout: AttentionLayout, layer: int) -> Tensors:
    """Tensors of one layer's attention, by name relative to the attention module."""
    path = layout.attention.format(layer) + "."
    if isinstance(tensors, StoredWeights):
        return tensors.under(path)
    return {n[len(path) :]: t for n, t in tensors.items() if n.startswith(path)}


def check_same_layers(tensors: Tensors, layout: AttentionLayout, n_layers: int, name: str) -> None:
    """Raise ``UnsupportedModelError`` unless the attention of all layers has the same weights.

    Args:
        tensors: parameters of the model by transformers' names.
        layout: layout of its architecture.
        n_layers: number of layers of its configuration.
        name: name of the model in the error message.
    """
    shapes = [
        {leaf: tuple(tensor.shape) for leaf, tensor in layer_tensors(tensors, layout, n).items()}
        for n in range(n_layers)
    ]
    for layer, found in enumerate(shapes):
        odd = sorted(set(found.items()) ^ set(shapes[0].items()))
        if odd or not found:
            what = f"differs from layer 0 in {odd[0][0]!r} {odd[0][1]}" if found else "has none"
            raise UnsupportedModelError(
                f"{name}: expected attention weights at {layout.attention!r}, the same in all "
                f"{n_layers} layers: layer {layer} {what}"
            )


def bridge_weights(
    bridge: Any, layout: AttentionLayout, config: Any, layer: int, tensors: Tensors
) -> AttentionWeights:
    """One layer's weights as the bridge uses them in a forward pass.

    Args:
        bridge: a ``TransformerBridge``.
        layout: layout of its architecture.
        config: configuration of the wrapped model.
        layer: layer index.
        tensors: ``plain_tensors`` or ``StoredWeights`` of the wrapped model.
    """
    weights = layout.read(layer_tensors(tensors, layout, layer), config)
    if not layout.joint:
        return weights
    # A bridge splits a joint matrix into separate parts, and runs (and trains) those.
    part = bridge.blocks[layer].attn
    parts = dict(zip("qkv", lens_weights(part), strict=True))
    for letter, bias in zip("qkv", lens_biases(part), strict=True):
        old = getattr(weights, f"{letter}_bias")
        if old is not None and bias is not None:
            parts[f"{letter}_bias"] = bias.reshape(old.shape)
    return replace(weights, **parts)


def lens_weights(
    attention: Any,
) -> tuple[Float[torch.Tensor, "head d_head d_model"], ...]:
    """q, k and v of a TransformerLens attention; key heads are not repeated.

    A bridge over a joint matrix runs (and trains) these parts, not the matrix.

    Raises:
        UnsupportedModelError: the weights can't be read per head.
    """
    return tuple(_lens_tensor(attention, f"W_{n}").transpose(1, 2) for n in "QKV")


def lens_biases(
    attention: Any,
) -> tuple[Float[torch.Tensor, "..."] | None, ...]:
    """The biases of q, k and v, in whatever shape the model has, or None if absent."""
    found: list[torch.Tensor | None] = []
    for letter in "QKV":
        try:
            found.append(_lens_tensor(attention, f"b_{letter}", None))
        except UnsupportedModelError:
            found.append(None)
    return tuple(found)


def _lens_tensor(attention: Any, name: str, ndim: int | None = 3) -> torch.Tensor:
    try:
        grouped = getattr(attention, f"_{name}", None)  # HookedTransformer, one per key head
        tensor: Any = getattr(attention, name) if grouped is None else grouped
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"{name} can't be read per head ({error})") from None
    if not isinstance(tensor, torch.Tensor) or (ndim is not None and tensor.ndim != ndim):
        shape = tuple(getattr(tensor, "shape", ()))
        raise UnsupportedModelError(f"{name} has shape {shape}: expected [head, d_model, d_head]")
    return tensor.detach()
