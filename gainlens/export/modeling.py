"""Slim modelling code: the model of a family with a thin attention module in every layer.

For each row of ``gainlens.export.families`` there is a configuration class with a
``gainlens_…`` model type and a model class, both registered with transformers' Auto classes, so
``AutoModelForCausalLM.from_pretrained(folder)`` reads a slim checkpoint after ``import gainlens``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import nn
from transformers import AttentionInterface

from gainlens.errors import InputError
from gainlens.export.attention import ATTENTION, eager_forward, register
from gainlens.export.cache import prepare_layer
from gainlens.export.families import FAMILIES, SlimFamily
from gainlens.export.layout import HeadLayout
from gainlens.export.plan import SlicePlan
from gainlens.export.savings import savings_line
from gainlens.export.slot_rotation import SlotRotary

PREFIX = "gainlens_"
CODE = "modeling_gainlens"
"""Module in a saved folder by which transformers finds the classes: ``trust_remote_code=True``."""
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
        self.sliding_window = family.window(config, layer_idx)
        self.attention_dropout = family.dropout(config)
        self.eps = float(getattr(config, "rms_norm_eps", 0.0))
        d_model, full = int(config.hidden_size), family.d_head(config)
        # A norm's statistic runs over the full width, so with one the projections stay whole.
        projected = full if family.norm else layout.width
        self.q_proj = nn.Linear(d_model, self.n_heads * projected, bias="q" in biases)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * projected, bias="k" in biases)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * value_width, bias="v" in biases)
        self.o_proj = nn.Linear(self.n_heads * value_width, d_model, bias="o" in biases)
        if family.norm:
            self.q_norm = nn.Parameter(torch.ones(self.n_kv_heads, layout.width))
            self.k_norm = nn.Parameter(torch.ones(self.n_kv_heads, layout.width))
        self.normed, self.norm_offset = family.norm, family.norm_offset
        self.resid_dropout = nn.Dropout(config.resid_pdrop if family.resid_dropout else 0.0)
        self.rotates = layout.frequency is not None
        self.still = layout.still
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
        if self.normed:
            q = self._norm(q, self.q_norm.repeat_interleave(self.num_key_value_groups, 0))
            k = self._norm(k, self.k_norm)
        if self.rotates and position_embeddings is not None:
            q, k = self._rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # Under autocast rotation and norm give float32; the cache and the kernel take one type.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            prepare_layer(cache, self.layer_idx, k, v)
            k, v = cache.update(k, v, self.layer_idx)
            k, v = k.to(q.dtype), v.to(q.dtype)  # a cache filled outside autocast, or inside
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
        factor: Float[torch.Tensor, "head width"],
    ) -> Float[torch.Tensor, "batch pos head width"]:
        """Norm with the statistic over the full width, in float32; returns only the kept slots."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        factor = factor.float() + self.norm_offset
        return (wide[..., : self.head_dim] * scale * factor).to(x.dtype)

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


def slim_config(config: Any, family: SlimFamily, plan: SlicePlan, biases: str) -> Any:
    """The configuration of the slim version of a model with ``config``."""
    settings = config.to_dict()
    own = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
    for name in own:
        settings.pop(name, None)
    cls, _ = CLASSES[family.name]
    return cls(
        **settings,
        gainlens={"plan": plan.to_json(), "biases": biases},
        architectures=[f"Slim{family.name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"{CODE}.Slim{family.name}Config",
            "AutoModelForCausalLM": f"{CODE}.Slim{family.name}ForCausalLM",
        },
    )


def plan_of(config: Any) -> SlicePlan:
    """The plan that a slim configuration was made with.

    Raises:
        InputError: not a slim configuration.
    """
    stored = getattr(config, "gainlens", None)
    if not isinstance(stored, dict) or "plan" not in stored:
        raise InputError(
            f"config={type(config).__name__} holds no slice plan: expected that of a slim model"
        )
    return SlicePlan.from_json(stored["plan"], "config.gainlens['plan']")


def plan_rotary_dim(family: SlimFamily, config: Any, plan: SlicePlan) -> int:
    """Rotary width in the basis of the plan."""
    return family.rotary_dim(config) if plan.basis == "own" else 0


def family_of(config: Any) -> SlimFamily:
    """The row of a slim configuration."""
    model_type = str(getattr(config, "model_type", ""))
    for family in FAMILIES.values():
        if model_type == model_type_of(family):
            return family
    raise InputError(f"model_type={model_type!r} is not that of a slim model")


def model_type_of(family: SlimFamily) -> str:
    """``gainlens_llama`` and so on."""
    base: Any = getattr(transformers, family.config_class)
    return PREFIX + str(base.model_type)


def install_attention(model: nn.Module, config: Any, family: SlimFamily) -> None:
    """Replace every attention module of ``model`` by a ``SlimAttention``."""
    with torch.device("cpu"):  # from_pretrained makes models where tensors hold no numbers
        plan = plan_of(config)
        layouts, table = plan.turning(plan_rotary_dim(family, config, plan))
        if table is not None:
            base: Any = model.base_model
            base.rotary_emb = SlotRotary(base.rotary_emb, table)
    n_layers, _, d_head = plan.shape
    values = plan.value_widths or (d_head,) * n_layers
    biases = str(config.gainlens["biases"])
    for layer, (layout, width) in enumerate(zip(layouts, values, strict=True)):
        path, _, name = family.attention.format(layer).rpartition(".")
        thin = ATTENTION_CLASSES[family.name](config, family, layer, layout, width, biases)
        setattr(model.get_submodule(path), name, thin)


def _classes(family: SlimFamily) -> tuple[Any, Any]:
    """The configuration and the model class of one row."""
    base_config: Any = getattr(transformers, family.config_class)
    base_model: Any = getattr(transformers, family.model_class)

    config_class = type(
        f"Slim{family.name}Config",
        (base_config,),
        {
            "__module__": __name__,
            "__doc__": f"{family.config_class} with a slice plan in ``gainlens``.",
            "model_type": model_type_of(family),
            "base_model_tp_plan": None,
            "base_model_pp_plan": None,
            "register_for_auto_class": classmethod(_stay_in_gainlens),
        },
    )

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation is None:
            config._attn_implementation = ATTENTION
        base_model.__init__(self, config, *args, **kwargs)
        install_attention(self, config, family)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base_model.save_pretrained(self, save_directory, *args, **kwargs)
        (Path(save_directory) / f"{CODE}.py").write_text(_code(family), encoding="utf-8")

    def extra_repr(self: Any) -> str:
        layers = [m for m in self.modules() if isinstance(m, SlimAttention)]
        size = next(self.parameters()).element_size()
        return savings_line(layers, family.d_head(self.config), size)

    model_class = type(
        f"Slim{family.name}ForCausalLM",
        (base_model,),
        {
            "__module__": __name__,
            "__doc__": f"{family.model_class} with thin keys; made by ``gainlens.slim``.",
            "__init__": __init__,
            "save_pretrained": save_pretrained,
            "extra_repr": extra_repr,
            "register_for_auto_class": classmethod(_stay_in_gainlens),
            "config_class": config_class,
            "_tp_plan": {},
            "_can_set_attn_implementation_cached_value": True,
            # The configuration names the full head: let the first keys say how wide a cache is.
            "_get_static_cache_init_shape": lambda self: None,
        },
    )
    return config_class, model_class


def _stay_in_gainlens(cls: Any, auto_class: str = "") -> None:
    """Classes that were found through a folder's code are not copied into the next folder."""


def _code(family: SlimFamily) -> str:
    return (
        '"""This checkpoint was made by gainlens, which runs it: pip install gainlens."""\n\n'
        "from gainlens.export.modeling import (  # noqa: F401\n"
        f"    Slim{family.name}Config,\n"
        f"    Slim{family.name}ForCausalLM,\n"
        ")\n"
    )


def _attention_class(family: SlimFamily) -> type[SlimAttention]:
    """A ``SlimAttention`` that transformers treats as the attention class of the family.

    ``output_attentions`` records only modules of the class that each backbone names in a table of
    the whole process. A subclass is recorded without a change to that shared table.
    """
    home = sys.modules[getattr(transformers, family.model_class).__module__]
    own: Any = getattr(home, f"{family.name}Attention")
    return type(
        f"Slim{family.name}Attention",
        (SlimAttention, own),
        {"__module__": __name__, "__doc__": f"``SlimAttention`` in the place of {own.__name__}."},
    )


ATTENTION_CLASSES = {f.name: _attention_class(f) for f in FAMILIES.values()}
for _attention in ATTENTION_CLASSES.values():
    globals()[_attention.__name__] = _attention
CLASSES: dict[str, tuple[Any, Any]] = {f.name: _classes(f) for f in FAMILIES.values()}
for _config, _model in CLASSES.values():
    globals()[_config.__name__], globals()[_model.__name__] = _config, _model


def register_auto_classes() -> None:
    """Make slim checkpoints known to ``AutoConfig`` and ``AutoModelForCausalLM``."""
    register()
    for config_class, model_class in CLASSES.values():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
