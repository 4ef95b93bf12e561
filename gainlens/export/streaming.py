"""Models whose weights are made one at a time, when they run or are written.

The slim version of a model that does not fit into memory does not fit either. Its parameters stay
on the device ``meta``, and hooks of accelerate ask a mapping for those of a module when it runs.
The mapping makes each from the weights of the original, which lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Shaped
from torch import nn

Make = Callable[[str], Shaped[torch.Tensor, "..."]]


class MadeWeights(Mapping[str, torch.Tensor]):
    """Weights by name, each made when it is asked for.

    Args:
        names: of all weights.
        make: from a name to the weight.
    """

    def __init__(self, names: Collection[str], make: Make) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __repr__(self) -> str:
        return f"MadeWeights({len(self)} weights)"

    def __getitem__(self, name: str) -> Shaped[torch.Tensor, "..."]:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would make the weight


class OneLayer:
    """Makes weights by name; those of a layer's attention are made together and kept till the next.

    Args:
        prefixes: of the names in each layer's attention.
        attention: from a layer to its weights by name.
        others: makes the weights outside.
        tied: names of weights that equal another, by whose name they are made.
    """

    def __init__(
        self,
        prefixes: list[str],
        attention: Callable[[int], dict[str, torch.Tensor]],
        others: Make,
        tied: Mapping[str, str],
    ) -> None:
        self._prefixes, self._attention, self._others = prefixes, attention, others
        self._tied = dict(tied)
        self._layer: int | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> Shaped[torch.Tensor, "..."]:
        """The weight ``name``."""
        name = self._tied.get(name, name)
        layer = next((n for n, p in enumerate(self._prefixes) if name.startswith(p)), None)
        if layer is None:
            return self._others(name)
        if layer != self._layer:
            self._kept = {}  # before the next is made: one layer at a time
            self._layer, self._kept = layer, self._attention(layer)
        return self._kept[name]


def stream(
    model: Any,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Any:
    """Let a transformers model take its weights from ``weights``, a module's when it runs.

    Args:
        model: without weights (see ``gainlens.export.building.without_weights``); changed.
        weights: by the model's names, tied ones under each of them.
        dtype: of the weights.
        device: on which the model runs.
    """
    hooks: Any = import_module("accelerate.hooks")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # accelerate converts what it reads to the type that it finds here
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    hook = hooks.AlignDevicesHook(execution_device=device, io_same_device=True)
    hooks.add_hook_to_module(model, hook, append=True)
    hooks.attach_align_device_hook(
        model, execution_device=device, offload=True, weights_map=weights
    )
    model.hf_device_map = {"": "disk"}  # tells save_pretrained to ask the hooks
    return model.eval()
