"""Matrix products without gradients, using the faster of PyTorch's two CPU libraries.

``torch.nn.functional.linear`` multiplies float32 matrices with MKL. On non-Intel processors, MKL
runs at less than half the speed of oneDNN, the library that PyTorch uses for bfloat16 and compiled
graphs. The choice depends only on dtype and device, so a resumed run gives identical bytes.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float


def linear(
    x: Float[torch.Tensor, "*batch width"],
    weight: Float[torch.Tensor, "out width"],
    bias: Float[torch.Tensor, " out"] | None = None,
) -> Float[torch.Tensor, "*batch out"]:
    """``x @ weight.T + bias``; equal to ``torch.nn.functional.linear`` to float32 rounding."""
    if _takes(x, weight):
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return torch.nn.functional.linear(x, weight, bias)


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and AVAILABLE
    )


def use_fast_linear(model: torch.nn.Module) -> None:
    """Make the plain linear modules of ``model`` use ``linear``."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def _available() -> bool:
    """Whether this build of PyTorch has the operator and it gives the right product."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x = torch.arange(6.0).reshape(1, 2, 3)
    weight = torch.arange(12.0).reshape(4, 3)
    try:
        with torch.inference_mode():
            found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, x @ weight.T)


AVAILABLE = _available()
"""Whether oneDNN's matrix product is available."""
