"""Backward passes of a model whose weights are not in memory.

Autograd keeps the weights that a backward pass needs, so that after a forward pass all of them
would be in memory. Here it keeps where they are, and reads each again when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
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
    hooks: Any = import_module("accelerate.hooks")
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

    before: list[tuple[Any, Any]] = []
    try:
        for module in getattr(model, "original_model", model).modules():
            hook = vars(module).get("_hf_hook")
            stored = [h for h in (hook, *getattr(hook, "hooks", ())) if _stores(h)]
            if stored:
                before.append((module, hook))
                module._hf_hook = hooks.SequentialHook(
                    hook, _noting(running, stored[0].weights_map)
                )
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for module, hook in before:
            module._hf_hook = hook


def _stores(hook: Any) -> bool:
    return getattr(hook, "weights_map", None) is not None


def _noting(running: dict[int, Read], stored: Any) -> Any:
    """A hook that notes where a module's weights come from while it runs."""
    hooks: Any = import_module("accelerate.hooks")

    class Noting(hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.mine = []
            for leaf, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    place = parameter.untyped_storage().data_ptr()
                    running[place] = _reader(stored, leaf, parameter.device, parameter.dtype)
                    self.mine.append(place)
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            for place in self.mine:  # its memory is free for others from here on
                running.pop(place, None)
            return output

    return Noting()


def _reader(stored: Any, leaf: str, device: torch.device, dtype: torch.dtype) -> Read:
    return lambda: torch.as_tensor(stored[leaf]).detach().to(device, dtype)
