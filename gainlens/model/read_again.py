"""Backward passes of a model whose weights are not in memory.

Autograd keeps the weights that a backward pass needs, so that after a forward pass all of them
would be in memory. Here it keeps where they are, and reads each again when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gainlens.model.stored_weights import is_offloaded

Read = Callable[[], torch.Tensor]


@contextmanager
def read_again(model: Any) -> Iterator[None]:
    """Inside, the graph of a forward pass holds activations, but no weight that lies elsewhere.

    Args:
        model: a TransformerBridge or a transformers model; nothing happens if its weights are in
            memory.
    """
    if not is_offloaded(model):
        yield
        return
    running: dict[int, Read] = {}

    def pack(tensor: torch.Tensor) -> Any:
        read = running.get(tensor.untyped_storage().data_ptr())
        if read is None:
            return tensor
        return read, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        read, *view = packed
        weight: torch.Tensor = read().as_strided(*view)
        return weight

    noting: list[Any] = []
    try:
        for module in getattr(model, "original_model", model).modules():
            hook = vars(module).get("_hf_hook")
            for one in (hook, *getattr(hook, "hooks", ())):
                if getattr(one, "weights_map", None) is not None:
                    _note(one, running)
                    noting.append(one)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for one in noting:
            del one.pre_forward, one.post_forward


def _note(hook: Any, running: dict[int, Read]) -> None:
    """Let a hook of accelerate note where a module's weights come from while the module runs.

    On the hook itself, since a bridge asks for its class.
    """
    load, drop = hook.pre_forward, hook.post_forward
    mine: list[int] = []

    def pre_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        given = load(module, *args, **kwargs)
        for leaf, parameter in module.named_parameters(recurse=hook.place_submodules):
            if not parameter.is_meta:
                place = parameter.untyped_storage().data_ptr()
                running[place] = _reader(hook.weights_map, leaf, parameter.device, parameter.dtype)
                mine.append(place)
        return given

    def post_forward(module: Any, output: Any) -> Any:
        while mine:  # their memory is free for others from here on
            running.pop(mine.pop(), None)
        return drop(module, output)

    hook.pre_forward, hook.post_forward = pre_forward, post_forward


def _reader(stored: Any, leaf: str, device: torch.device, dtype: torch.dtype) -> Read:
    return lambda: torch.as_tensor(stored[leaf]).detach().to(device, dtype)
