"""Matrix products for passes that take no gradient, by the faster of PyTorch's two CPU libraries.

``torch.nn.functional.linear`` multiplies float32 matrices with MKL, which on other makers'
processors runs at less than half the rate of oneDNN, the library that PyTorch uses for bfloat16
and for compiled graphs. Which one is used depends on dtype and device alone, so that a run that is
resumed gives the same bytes.
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
    """Let the plain linear modules of ``model`` multiply by ``linear``."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def _available() -> bool:
    """Whether this build of PyTorch has the operator, and it multiplies."""
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
"""Whether oneDNN's product can be called."""
