"""Build models around existing weights, without a second copy in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.overrides import TorchFunctionMode

from gainlens.errors import UnsupportedModelError
from gainlens.export.streaming import MadeWeights, stream
from gainlens.model.stored_weights import StoredWeights, is_offloaded

State = dict[str, Float[torch.Tensor, "..."]]


class _EmptyOnMeta(TorchFunctionMode):
    """Create uninitialised tensors on the meta device. Applies only to the current thread.

    Parameters start as ``torch.empty``; buffers are computed. transformers finds the current
    device with an empty list. On the meta device it skips the initialisation of weights, which
    would replace functions of ``torch.nn.init`` in the whole process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        empty = func is torch.empty or (func is torch.tensor and args and args[0] == [])
        if empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def without_weights(make: Callable[[], Any]) -> Any:
    """Build with ``make``: parameters on the meta device (no memory), buffers with values.

    Other threads are not affected and may build models at the same time.

    Args:
        make: function that builds a module on the CPU.

    Raises:
        UnsupportedModelError: a buffer is not computed when the module is built.
    """
    with _EmptyOnMeta():
        model = make()
    moved: dict[int, nn.Parameter] = {}  # keep tied parameters tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                new = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
                setattr(module, name, moved.setdefault(id(parameter), new))
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UnsupportedModelError(
            f"{type(model).__name__} fills its buffer {left[0]!r} after it is built: gainlens "
            "can't build it without its weights"
        )
    return model


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


def float_copy(
    slim: Any, weights: Callable[[Any], Mapping[str, torch.Tensor]] | None = None
) -> Any:
    """The same slim model in float32 on the CPU, with frequencies from its configuration.

    Weights that already are float32 on the CPU are shared, not copied. Those that are not in memory
    are converted each time they are read.

    Args:
        slim: a slim model of any floating point dtype, on any device.
        weights: function from such a copy to a state that replaces its own.
    """
    if is_offloaded(slim):
        thin = streamed_copy(slim, torch.float32)
        return thin if weights is None else streamed_copy(slim, torch.float32, weights(thin))
    config = copy.deepcopy(slim.config)
    config.dtype = torch.float32
    thin = without_weights(lambda: type(slim)(config))
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


def streamed_copy(
    slim: Any, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """The same model in another type on the CPU, whose weights are read when they are used.

    Args:
        slim: a transformers model.
        dtype: of the copy.
        weights: take the place of its own, by all their names.
    """
    config = copy.deepcopy(slim.config)
    config.dtype = dtype
    thin = without_weights(lambda: type(slim)(config))
    held = StoredWeights(slim)
    own = MadeWeights(list(held), lambda name: held[name].cpu().to(dtype))
    buffers = {n: b.detach().cpu() for n, b in slim.named_buffers() if n in slim.state_dict()}
    thin.load_state_dict(buffers, strict=False, assign=True)
    thin.generation_config = slim.generation_config
    return stream(thin, own if weights is None else weights, dtype)
