"""Configurations of slim folders for transformers' ``AutoConfig``, checked as they are read.

vLLM reads the configuration before anything else, so a folder that can't be served is refused here,
in the first process, with one line.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.families import FAMILIES, PREFIX, REFUSED, Family
from gainlens_vllm.folder import check_weights
from gainlens_vllm.plan import Plan, read_plan
from gainlens_vllm.rotation import slot_frequencies
from gainlens_vllm.version import check_version

_plans: dict[tuple[str, tuple[int, int, int], int], Plan] = {}


def family_of(config: Any) -> Family:
    """The row of a slim configuration.

    Raises:
        SlimFolderError: none of the table.
    """
    for family in FAMILIES:
        if config.model_type == model_type_of(family.config_class):
            return family
    raise SlimFolderError(f"model_type={config.model_type!r} is not one that gainlens-vllm serves")


def plan_of(config: Any) -> Plan:
    """The plan of a slim configuration; errors as for ``read_plan``."""
    family = family_of(config)
    if config.gainlens and config.gainlens.get("maps_after_norm"):
        raise SlimFolderError(
            f"{_where(config)} keeps the maps of its cut after the norm on its keys, which "
            "gainlens-vllm does not serve (cut it by its mask alone)"
        )
    stored, shape, rotary = config.gainlens, family.shape(config), family.rotary_dim(config)
    key = (json.dumps(stored, sort_keys=True, default=str), shape, rotary)
    if key not in _plans:  # each layer asks
        _plans[key] = read_plan(stored, shape, rotary, _where(config))
    return _plans[key]


def _where(config: Any) -> str:
    return str(getattr(config, "_name_or_path", "") or "config.json")


def check_folder(config: Any, vllm_version: str | None = None) -> None:
    """Raise ``SlimFolderError`` if what was read can't be served.

    Args:
        config: a slim configuration.
        vllm_version: by default that of the installed vLLM.
    """
    if vllm_version is None:
        import vllm

        vllm_version = str(vllm.__version__)
    check_version(vllm_version)
    family, plan = family_of(config), plan_of(config)
    for layer in range(len(plan.layers)):
        slot_frequencies(plan, config, family.rotary_dim(config), layer)
    if Path(_where(config)).is_dir():
        check_weights(Path(_where(config)), config, family, plan)


@cache
def model_type_of(config_class: str) -> str:
    """``gainlens_llama`` and so on."""
    return PREFIX + str(getattr(transformers, config_class).model_type)


def slim_config_class(config_class: str, refusal: str | None = None) -> Any:
    """A configuration class with a slice plan in ``gainlens``.

    Args:
        config_class: that of the uncut model, in transformers.
        refusal: why such folders are not served, or None.
    """
    base: Any = getattr(transformers, config_class)

    def from_dict(cls: Any, settings: dict[str, Any], /, **kwargs: Any) -> Any:
        if refusal is not None:
            raise SlimFolderError(
                f"{kwargs.get('name_or_path', 'config.json')} is a slim {config_class[:-6]}, which "
                f"gainlens-vllm does not serve: {refusal}"
            )
        made = base.from_dict.__func__(cls, settings, **kwargs)
        check_folder(made[0] if isinstance(made, tuple) else made)
        return made

    name = f"Slim{config_class}"
    contents = {
        "__module__": __name__,
        "__doc__": f"{config_class} with a slice plan.",
        "__qualname__": name,
        "model_type": model_type_of(config_class),
        "gainlens": None,
        "base_model_tp_plan": None,
        "base_model_pp_plan": None,
        "from_dict": classmethod(from_dict),
    }
    return type(name, (base,), contents)


CLASSES = {
    **{family.config_class: slim_config_class(family.config_class) for family in FAMILIES},
    **{
        name: slim_config_class(name, reason)
        for name, reason in REFUSED.values()
        if hasattr(transformers, name)  # vLLM may hold an older one
    },
}
for _class in CLASSES.values():
    globals()[_class.__name__] = _class  # a configuration is pickled by the name of its class


def register_configs() -> None:
    """Make the classes known to ``AutoConfig``."""
    for made in CLASSES.values():
        transformers.AutoConfig.register(made.model_type, made, exist_ok=True)
