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
from torch import nn

from gainlens.errors import InputError
from gainlens.export.after_norm import MAPS, maps_follow
from gainlens.export.attention import ATTENTION, register
from gainlens.export.families import FAMILIES, SlimFamily
from gainlens.export.layout import KeyPairs
from gainlens.export.plan import SlicePlan
from gainlens.export.savings import savings_line
from gainlens.export.slim_attention import SlimAttention, attention_class
from gainlens.export.slot_rotation import SlotRotary

PREFIX = "gainlens_"
CODE = "modeling_gainlens"
"""Module in a saved folder by which transformers finds the classes: ``trust_remote_code=True``."""


def slim_config(config: Any, family: SlimFamily, plan: SlicePlan, biases: str) -> Any:
    """The configuration of the slim version of a model with ``config``."""
    stored: dict[str, Any] = {"plan": plan.to_json(), "biases": biases}
    if maps_follow(family, config, plan.maps):
        stored[MAPS] = True
    settings = config.to_dict()
    own = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
    for name in own:
        settings.pop(name, None)
    cls, _ = CLASSES[family.name]
    return cls(
        **settings,
        gainlens=stored,
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


def plan_pairs(family: SlimFamily, config: Any, plan: SlicePlan) -> KeyPairs:
    """Which dimensions rotate together, in the basis of the plan."""
    return family.pairs(config) if plan.basis == "own" else KeyPairs(0)


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
        layouts, table = plan.turning(plan_pairs(family, config, plan))
        if table is not None and family.angles != "positions":
            base: Any = model.base_model
            base.rotary_emb = SlotRotary(base.rotary_emb, table)
    n_layers, _, d_head = plan.shape
    values = plan.value_widths or (d_head,) * n_layers
    biases = str(config.gainlens["biases"])
    for layer, (layout, width) in enumerate(zip(layouts, values, strict=True)):
        path, _, name = family.attention.format(layer).rpartition(".")
        thin = ATTENTION_CLASSES[family.name](config, family, layer, layout, width, biases)
        if table is not None:
            thin.columns = "halves"
            thin.angles = SlotRotary(thin.angles, table) if thin.angles is not None else None
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
            "whole_masks": family.whole_masks,
            "base_model_tp_plan": None,
            "base_model_pp_plan": None,
            "register_for_auto_class": classmethod(_stay_in_gainlens),
        },
    )

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        chosen = config._attn_implementation or ATTENTION
        # Some families pick a class of their own by this name; it is replaced anyway.
        config._attn_implementation = "eager" if _picks_a_class(base_model) else chosen
        base_model.__init__(self, config, *args, **kwargs)
        config._attn_implementation = chosen
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


def _picks_a_class(model_class: Any) -> bool:
    """Whether the family has a class of attention for each implementation."""
    home = vars(sys.modules[model_class.__module__])
    return any(name.endswith("_ATTENTION_CLASSES") for name in home)


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


ATTENTION_CLASSES = {f.name: attention_class(f) for f in FAMILIES.values()}
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
