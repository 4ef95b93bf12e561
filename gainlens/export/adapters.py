"""Models with adapters inside (PEFT): merged on a copy where that is exact, otherwise refused.

PEFT is not imported: its layers are recognised by their attributes. A LoRA layer
``y = W x + s B A x`` equals the linear layer ``W + s B A``.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gainlens.errors import UnsupportedModelError

MERGE = "merge first: model = model.merge_and_unload()"


def adapters_in(model: Any) -> dict[str, nn.Module]:
    """Modules that wrap a module of the model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        or isinstance(getattr(module, "original_module", None), nn.Module)
    }


def check_no_adapters(model: Any, what: str) -> None:
    """Raise ``UnsupportedModelError`` if the model has adapters.

    Args:
        model: any of the three kinds, or a ``PeftModel``.
        what: what cannot be done to such a model, for the error message.
    """
    inner = getattr(model, "original_model", model)
    wrapped = hasattr(inner, "peft_config") and hasattr(inner, "get_base_model")
    if wrapped or (isinstance(inner, nn.Module) and adapters_in(inner)):
        raise UnsupportedModelError(f"model has adapters inside and can't be {what}: {MERGE}")


def without_adapters(model: Any) -> Any:
    """``model``, or a copy with LoRA merged into its linear layers if it has adapters.

    The copy shares all tensors that no adapter changes. Weights are added in float32 (float64 if
    they are float64) and rounded once to the dtype of the layer.

    Args:
        model: a transformers model or a ``PeftModel``; not changed.

    Raises:
        UnsupportedModelError: an adapter is not a sum of matrices.
    """
    base = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        base = model.get_base_model()
    found = adapters_in(base)
    if not found:
        kinds = getattr(model, "peft_config", {}) if base is not model else {}
        if any(getattr(kind, "is_prompt_learning", False) for kind in kinds.values()):
            raise UnsupportedModelError(
                f"model={type(model).__name__} learns a prompt, which no weight holds: pass "
                "model.get_base_model() for the model without it"
            )
        return base
    for name, module in found.items():
        if reason := _reason(module):
            raise UnsupportedModelError(f"adapter at {name!r} {reason}: {MERGE}")
    memo: dict[int, Any] = {id(t): t for t in chain(base.parameters(), base.buffers())}
    merged = copy.deepcopy(base, memo)
    for name, module in found.items():
        path, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(path), leaf, _merged(module))
    return merged


def _active(module: Any) -> list[str]:
    """Names of the adapters that are active in a forward pass and not merged yet."""
    if getattr(module, "disable_adapters", False):
        return []
    names = module.active_adapters
    names = [names] if isinstance(names, str) else names
    done = getattr(module, "merged_adapters", ())
    return [name for name in names if name in module.lora_A and name not in done]


def _reason(module: Any) -> str | None:
    """Why an adapter is not a sum of matrices, or None if it is."""
    inner = getattr(module, "base_layer", None)
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):
        return f"({type(module).__name__}) is no LoRA of a linear layer"
    if type(inner) not in (nn.Linear, Conv1D):
        return f"(on {type(inner).__name__}) is no LoRA of a plain linear layer"
    if getattr(module, "disable_adapters", False) and getattr(module, "merged_adapters", ()):
        return "is merged and disabled at once"
    for name in _active(module):
        special = name in getattr(module, "lora_variant", {})
        if special or getattr(module, "use_dora", {}).get(name, False):
            return f"({name}) is a variant of LoRA that does more than add a matrix"
        a, b = module.lora_A[name], module.lora_B[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None:
            return f"({name}) has a bias or is no pair of matrices"
    return None


@torch.no_grad()
def _merged(module: Any) -> Any:
    """A linear layer without adapters; a bias is shared."""
    inner = module.base_layer
    names = _active(module)
    plain: Any = copy.deepcopy(inner, {id(t): t for t in inner.parameters()})
    if names:
        wide = torch.promote_types(inner.weight.dtype, torch.float32)
        weight = inner.weight.to(wide)
        for name in names:
            product = module.lora_B[name].weight.to(wide) @ module.lora_A[name].weight.to(wide)
            product = product * float(module.scaling[name])
            weight = weight + (product.T if isinstance(inner, Conv1D) else product).to(weight)
        plain.weight = nn.Parameter(weight.to(inner.weight.dtype), requires_grad=False)
    return plain
