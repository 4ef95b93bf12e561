"""``SlimAttention``: the attention module of a slim model, for every family of the table."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import nn
from transformers import AttentionInterface

from gainlens.export.after_norm import mapped, maps_after_norm
from gainlens.export.attention import eager_forward
from gainlens.export.cache import prepare_layer
from gainlens.export.families import SlimFamily
from gainlens.export.layout import HeadLayout
from gainlens.export.masks import own_mask
from gainlens.export.slot_rotation import SlotRotary, usual_frequencies

_INTERFACE = AttentionInterface()


class SlimAttention(nn.Module):
    """Attention with thin keys: only kept dimensions; each head has its own frequencies.

    Args:
        config: the slim configuration.
        family: its row.
        layer_idx: number of the layer.
        layout: where the kept dimensions go.
        value_width: dimensions of a value head.
        biases: which of ``q``, ``k``, ``v``, ``o`` have one.
    """

    rope_index: Int[torch.Tensor, "kv_head slot"] | None
    q_norm: nn.Parameter
    k_norm: nn.Parameter
    q_norm_bias: nn.Parameter | None
    k_norm_bias: nn.Parameter | None

    def __init__(
        self,
        config: Any,
        family: SlimFamily,
        layer_idx: int,
        layout: HeadLayout,
        value_width: int,
        biases: str,
    ) -> None:
        nn.Module.__init__(self)  # not the family's own attention, see ATTENTION_CLASSES
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = family.n_kv_heads(config)
        self.num_key_value_groups = self.n_heads // self.n_kv_heads
        self.head_dim, self.value_dim = layout.width, value_width
        self.scaling = family.scaling(config, layer_idx)
        self.softcap, self.clip = family.softcap(config), family.clip(config)
        self.sliding_window = family.window(config, layer_idx)
        self.own_window = family.own_window(config, layer_idx)
        self.attention_dropout = family.dropout(config)
        self.norm, self.norm_offset = family.key_norm(config), family.norm_offset
        self.alibi, self.whole_masks = family.alibi, family.whole_masks
        d_model, full = int(config.hidden_size), family.d_head(config)
        self.mapped = maps_after_norm(config)
        # A norm's statistic runs over the full width, so with one the projections stay whole.
        projected = full if self.norm or self.mapped else layout.width
        self.q_proj = nn.Linear(d_model, self.n_heads * projected, bias="q" in biases)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * projected, bias="k" in biases)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * value_width, bias="v" in biases)
        self.o_proj = nn.Linear(self.n_heads * value_width, d_model, bias="o" in biases)
        if self.norm is not None:
            self.eps = float(getattr(config, self.norm.eps))
            normed = full if self.mapped else layout.width
            shapes = {"q": (self.n_heads if self.norm.own else self.n_kv_heads, normed)}
            shapes["k"] = (self.n_kv_heads, normed)
            for letter, shape in shapes.items():
                self.register_parameter(f"{letter}_norm", nn.Parameter(torch.ones(shape)))
                bias = nn.Parameter(torch.zeros(shape)) if self.norm.bias else None
                self.register_parameter(f"{letter}_norm_bias", bias)
        if self.mapped:
            self.q_map = nn.Parameter(torch.zeros(self.n_heads, layout.width, full))
            self.k_map = nn.Parameter(torch.zeros(self.n_kv_heads, layout.width, full))
        share = getattr(config, family.output_dropout) if family.output_dropout else 0.0
        self.resid_dropout = nn.Dropout(float(share))
        self.rotates = layout.frequency is not None
        self.still, self.columns = layout.still, family.angles
        self.angles: nn.Module | None = None
        if self.rotates and family.angles == "positions":
            frequencies = usual_frequencies(family.rotary_dim(config))
            self.angles = SlotRotary(nn.Identity(), frequencies)
        index = rope_rows(layout)
        self.register_buffer("rope_index", index)

    def forward(
        self,
        hidden_states: Float[torch.Tensor, "batch pos d_model"],
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[torch.Tensor, "batch pos d_model"], torch.Tensor | None]:
        """Called by the decoder layer of the family; accepts both names of the cache."""
        cache = layer_past if past_key_values is None else past_key_values
        batch, pos, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(batch, pos, self.n_heads, -1)
        k = self.k_proj(hidden_states).view(batch, pos, self.n_kv_heads, -1)
        v = self.v_proj(hidden_states).view(batch, pos, self.n_kv_heads, -1)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.norm is not None:
            q = self._norm(q, self.q_norm, self.q_norm_bias)
            k = self._norm(k, self.k_norm, self.k_norm_bias)
        if self.mapped:
            q, k = mapped(q, self.q_map), mapped(k, self.k_map)
        if self.angles is not None:
            position_embeddings = self.angles(q, kwargs["position_ids"])
        if self.rotates and position_embeddings is not None:
            q, k = self._rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # Under autocast rotation and norm give float32; the cache and the kernel take one type.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            prepare_layer(cache, self.layer_idx, k, v)
            k, v = cache.update(k, v, self.layer_idx)
            k, v = k.to(q.dtype), v.to(q.dtype)  # a cache filled outside autocast, or inside
        attention_mask = own_mask(self, attention_mask, q, k, kwargs)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        attend = _INTERFACE.get_interface(self.config._attn_implementation, eager_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        projected = self.o_proj(out.reshape(batch, pos, -1))
        return self.resid_dropout(projected), weights

    def _norm(
        self,
        x: Float[torch.Tensor, "batch pos head d_head"],
        factor: Float[torch.Tensor, "norm_head width"],
        bias: Float[torch.Tensor, "norm_head width"] | None,
    ) -> Float[torch.Tensor, "batch pos head width"]:
        """Norm with the statistic over the full width; returns what ``factor`` has: the kept
        slots, or everything where a map follows."""
        assert self.norm is not None
        group = x.shape[2] // len(factor)
        plain = self.norm(x, self.eps)[..., : factor.shape[-1]]
        out = plain * (factor.to(plain.dtype) + self.norm_offset).repeat_interleave(group, 0)
        if bias is not None:
            out = out + bias.to(plain.dtype).repeat_interleave(group, 0)
        return out.to(x.dtype)

    def _rotate(
        self,
        q: Float[torch.Tensor, "batch pos head width"],
        k: Float[torch.Tensor, "batch pos kv_head width"],
        cos: Float[torch.Tensor, "_ pos rotary_dim"],
        sin: Float[torch.Tensor, "_ pos rotary_dim"],
    ) -> tuple[
        Float[torch.Tensor, "batch pos head width"], Float[torch.Tensor, "batch pos kv_head width"]
    ]:
        """Rotate each slot pair by the angle of its original rotary pair."""
        if self.columns == "neighbours":
            cos, sin = cos[..., ::2], sin[..., ::2]
        else:
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        if self.rope_index is None:
            cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        else:
            if self.still:  # one more column that doesn't turn
                cos = torch.cat([cos, torch.ones_like(cos[..., :1])], -1)
                sin = torch.cat([sin, torch.zeros_like(sin[..., :1])], -1)
            cos, sin = cos[..., self.rope_index], sin[..., self.rope_index]
        group = self.num_key_value_groups
        turned_k = _turn(k, cos, sin)
        if cos.shape[2] > 1 and group > 1:
            cos, sin = cos.repeat_interleave(group, 2), sin.repeat_interleave(group, 2)
        return _turn(q, cos, sin), turned_k


def rope_rows(layout: HeadLayout) -> Int[torch.Tensor, "kv_head slot"] | None:
    """Frequency index of each slot pair, or None if slots rotate as in the full model."""
    if layout.frequency is None or layout.natural:
        return None
    rows = layout.frequency
    rows = rows[:1] if (rows == rows[:1]).all() else rows
    return torch.from_numpy(rows.copy())


def _turn(
    x: Float[torch.Tensor, "batch pos head width"],
    cos: Float[torch.Tensor, "_ pos _ slot"],
    sin: Float[torch.Tensor, "_ pos _ slot"],
) -> Float[torch.Tensor, "batch pos head width"]:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class AddsResidual(nn.Module):
    """An attention that returns its output with the residual added."""

    def forward(
        self,
        hidden_states: Float[torch.Tensor, "batch pos d_model"],
        residual: Float[torch.Tensor, "batch pos d_model"],
        **kwargs: Any,
    ) -> tuple[Float[torch.Tensor, "batch pos d_model"], torch.Tensor | None]:
        """Called by the decoder layer of the family."""
        out, weights = super().forward(hidden_states, **kwargs)
        return out + residual, weights


def attention_class(family: SlimFamily) -> type[SlimAttention]:
    """A ``SlimAttention`` that transformers treats as the attention class of the family.

    ``output_attentions`` records only modules of the class that each backbone names in a table of
    the whole process. A subclass is recorded without a change to that shared table.
    """
    recorded = getattr(getattr(transformers, family.model_class), "_can_record_outputs", None) or {}
    own: Any = recorded.get("attentions")
    own = getattr(own, "target_class", own)
    bases = (*((AddsResidual,) if family.adds_residual else ()), SlimAttention)
    return type(
        f"Slim{family.name}Attention",
        bases if own is None else (*bases, own),
        {"__module__": __name__, "__doc__": f"``SlimAttention`` for {family.model_class}."},
    )
