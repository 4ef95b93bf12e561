"""``SlimFamily``: what the attention of a model family does besides its projections.

``gainlens.export.families`` has one row per family, ``gainlens.model.attention_layouts`` says where
the projections are. A row is a set of functions of the configuration, for many families decide by
their configuration whether there is a norm, a window or a soft cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float

from gainlens.export.layout import KeyPairs
from gainlens.model.attention_layouts import LAYOUTS, AttentionLayout
from gainlens.model.families import FAMILIES as DECLARED


@dataclass(frozen=True)
class KeyNorm:
    """A norm on queries and keys, between the projections and the rotation.

    Attributes:
        over: what its statistic runs over: one head, or all heads of a token at once.
        centred: whether the mean is taken off first (a layer norm).
        own: whether each head has factors of its own; if not, all heads share one set.
        bias: whether something is added after the factors.
        eps: name of its setting in the configuration.
        shape: of what the original's module returns: ``[batch, pos, head, d_head]``,
            ``[batch, head, pos, d_head]``, or without an axis of heads.
    """

    over: Literal["head", "heads"] = "head"
    centred: bool = False
    own: bool = False
    bias: bool = False
    eps: str = "rms_norm_eps"
    shape: Literal["by_pos", "by_head", "flat"] = "by_pos"

    def __call__(
        self, x: Float[torch.Tensor, "batch pos head d_head"], eps: float
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """The norm without factors and bias, float32 (or wider, for a layer norm)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if self.centred else x.float()
        axes = (-1,) if self.over == "head" else (-2, -1)
        if self.centred:
            wide = wide - wide.mean(axes, keepdim=True)
        return wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)


WHOLE = (
    "a norm acts on queries and keys, and its statistic runs over the full width, so the "
    "projections stay whole"
)
"""Why thin keys save the cache alone in such a family."""


def usual_scale(config: Any, layer: int, d_head: int) -> float:
    """One over the root of the width of a head."""
    scale: float = float(d_head) ** -0.5
    return scale


def whole_head(config: Any, d_head: int) -> int:
    """Every dimension rotates."""
    return d_head


def share_of_head(config: Any, d_head: int) -> int:
    """The share that the configuration names rotates."""
    share = (config.rope_parameters or {}).get("partial_rotary_factor")
    width = int(d_head * (1.0 if share is None else share))
    return width + width % 2  # an odd width gets a frequency more than fit its pairs


def attention_dropout(config: Any) -> float:
    """The share under the names that most configurations use."""
    share: Any = getattr(config, "attn_pdrop", None)
    return float(getattr(config, "attention_dropout", 0.0) if share is None else share)


def sliding(config: Any, layer: int) -> int | None:
    """The window of all layers, or of those that the configuration calls sliding."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    found = getattr(config, "sliding_window", None)
    return None if found is None else int(found)


def never(config: Any, *rest: Any) -> None:
    """There is none."""


def always(config: Any, layer: int) -> bool:
    """In every layer."""
    return True


def decides(config: Any) -> Literal["sliced"]:
    """``gainlens.export.attention`` decides what mask is made."""
    return "sliced"


@dataclass(frozen=True)
class SlimFamily:
    """One row. Functions take the configuration, and the layer's number where they differ by layer.

    Attributes:
        name: name of the family in the names of the slim classes.
        config_class, model_class: the family's classes in transformers.
        refuse: reason why a configuration cannot be made slim, or None.
        key_norm: the norm on queries and keys, or None.
        rotary: how many leading dimensions of a head rotate, of its width; None where none does.
        turns: whether the layer rotates.
        angles: where an attention finds its cosines: in the first half of what the model passes
            (``halves``), in every second column (``neighbours``), or by computing them from the
            positions, with the usual frequencies to base 10,000 (``positions``).
        scale: factor on the query-key product.
        softcap: bound of the attention logits (tanh), or None.
        window: sliding window of the layer, which the model's masks know, or None.
        own_window: the same where the attention has to mask it.
        clip: bound on the projections' outputs, or None.
        dropout: on attention weights while training.
        output_dropout: setting of the dropout after the output projection inside the attention.
        adds_residual: whether the attention adds the residual itself.
        alibi: whether the attention is passed biases that grow with the position of a key.
        whole_masks: whether the model needs masks of numbers, ``[batch, 1, query, key]``.
        llama: whether the same weights, with biases, make a ``LlamaForCausalLM``.
    """

    name: str
    config_class: str
    model_class: str
    refuse: Callable[[Any], str | None] = never
    key_norm: Callable[[Any], KeyNorm | None] = never
    rotary: Callable[[Any, int], int] | None = whole_head
    turns: Callable[[Any, int], bool] = always
    angles: Literal["halves", "neighbours", "positions"] = "halves"
    scale: Callable[[Any, int, int], float] = usual_scale
    softcap: Callable[[Any], float | None] = never
    window: Callable[[Any, int], int | None] = never
    own_window: Callable[[Any, int], int | None] = never
    clip: Callable[[Any], float | None] = never
    dropout: Callable[[Any], float] = attention_dropout
    output_dropout: str | None = None
    adds_residual: bool = False
    alibi: bool = False
    whole_masks: bool = False
    llama: bool = False

    @property
    def layout(self) -> AttentionLayout:
        """Where the family keeps its attention weights."""
        return LAYOUTS[self.model_class]

    @property
    def attention(self) -> str:
        """Path of layer ``{}``'s attention module."""
        return self.layout.attention

    @property
    def output(self) -> str:
        """Name of the output projection inside the attention module."""
        return self.layout.output

    @property
    def norm_offset(self) -> float:
        """Offset that is added to the weights of the norms on queries and keys. They are stored
        without it, as in the original, because half precision would lose small values near one."""
        return self.layout.norm_offset if self.layout.norms else 0.0

    def d_head(self, config: Any) -> int:
        """Width of a full head."""
        return self.layout.sizes(config)[2]

    def n_kv_heads(self, config: Any) -> int:
        """Key heads per layer."""
        return self.layout.sizes(config)[1]

    def rotary_dim(self, config: Any) -> int:
        """How many leading dimensions of a head rotate, in layers that do."""
        return 0 if self.rotary is None else self.rotary(config, self.d_head(config))

    def pairs(self, config: Any) -> KeyPairs:
        """Which dimensions of a head rotate together, layer by layer."""
        width = self.rotary_dim(config)
        layers = range(int(config.num_hidden_layers))
        still = frozenset(layer for layer in layers if not self.turns(config, layer))
        pairing = DECLARED[self.model_class].pairing
        return KeyPairs(width, pairing if width else "half", still if width else frozenset())

    def scaling(self, config: Any, layer: int) -> float:
        """Softmax scale of the full head."""
        return self.scale(config, layer, self.d_head(config))

    def before_maps(self, config: Any) -> str | None:
        """What stands between the projections and the rotation, so that no map of queries or keys
        folds into a projection; None if nothing does."""
        if self.key_norm(config) is not None:
            return "a norm"
        return None if self.clip(config) is None else "a bound on queries, keys and values"

    def saves(self, config: Any) -> Literal["weights and cache", "cache alone"]:
        """What thin keys save. A norm's statistic runs over every row of the projections, and no
        smaller matrix has it: ‖Ax‖ = ‖Wx‖ for all x takes as many rows as W has rank."""
        return "weights and cache" if self.key_norm(config) is None else "cache alone"
