"""Making models around weights that exist already, without a second copy of them in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from gainlens.errors import UnsupportedModelError

State = dict[str, Float[torch.Tensor, "..."]]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory, but buffers with it."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def put(model: nn.Module, name: str, tensor: Float[torch.Tensor, "..."]) -> None:
    """Make ``tensor`` the parameter ``name``.

    Raises:
        UnsupportedModelError: another shape was expected.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise UnsupportedModelError(
            f"weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(old.shape)}"
        )
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=True))


def float_copy(slim: Any, weights: Callable[[Any], State] | None = None) -> Any:
    """The same slim model in float32 on the CPU, its frequencies as its configuration says.

    Weights that are float32 on the CPU already are shared, not copied.

    Args:
        slim: a slim model in any floating point type, on any device.
        weights: from such a copy to the state that takes the place of its own.
    """
    config = copy.deepcopy(slim.config)
    config.dtype = torch.float32
    with parameters_on_meta():
        thin = type(slim)(config)
    state = {
        name: t.detach().cpu().to(torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in slim.state_dict().items()
    }
    thin.load_state_dict(state, strict=True, assign=True)
    if weights is not None:
        thin.load_state_dict(weights(thin), strict=True, assign=True)
    thin.tie_weights()
    thin.generation_config = slim.generation_config
    return thin.eval()
