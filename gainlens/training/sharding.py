"""Weights that are not trained, divided among the processes between uses.

As in fully sharded data parallelism (Rajbhandari et al., 2020: ZeRO, stage 3): a layer's weights
are whole only while it runs, forward or backward. They are gathered as bytes, so nothing is
rounded, and are whole again after the run. Every process holds all active slices with their
optimiser state (a small part), the embeddings and the output head.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from gainlens.errors import GainlensError, InputError
from gainlens.training.processes import Processes


def launched_sharded() -> bool:
    """Whether ``accelerate launch --use_fsdp`` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")


def check_whole(model: Any) -> None:
    """Raise ``InputError`` if the parameters of ``model`` are already divided."""
    # By name: the classes need a build of PyTorch with distributed tensors.
    kinds = {type(p).__name__ for p in getattr(model, "parameters", tuple)()}
    if divided := kinds & {"DTensor", "FlatParameter"}:
        raise InputError(
            f"model={type(model).__name__} is divided among processes already ({min(divided)}): "
            "expected the whole model, which shard=True divides while it trains"
        )


class Part:
    """This process's part of some parameters; after ``free`` they have no memory.

    Args:
        parameters: with storage of their own, contiguous.
        processes: which divide them.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], processes: Processes) -> None:
        self._parameters = list(parameters)
        flat = torch.cat([_bytes(p) for p in parameters])
        size = -(-len(flat) // processes.count)
        flat = torch.nn.functional.pad(flat, (0, size * processes.count - len(flat)))
        self.held = flat[processes.rank * size : (processes.rank + 1) * size].clone()
        self._count, self._whole = processes.count, True

    @torch.no_grad()
    def fill(self) -> None:
        """Gather the parameters; every process must call this."""
        if self._whole:
            return
        whole = self.held.new_empty(self._count * len(self.held))
        dist.all_gather(list(whole.chunk(self._count)), self.held)
        start = 0
        for parameter in self._parameters:
            size = parameter.numel() * parameter.element_size()
            parameter.untyped_storage().resize_(size)
            # Through .data, since autograd must not take this for a change.
            _bytes(parameter).copy_(whole[start : start + size])
            start += size
        self._whole = True

    def free(self) -> None:
        """Free the memory of the whole parameters."""
        for parameter in self._parameters if self._whole else ():
            parameter.untyped_storage().resize_(0)
        self._whole = False


def _bytes(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.data.flatten().view(torch.uint8)


class Shards:
    """The parts of all layers, in order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    @property
    def held_bytes(self) -> int:
        """Bytes of the parts of this process."""
        return sum(len(part.held) for part in self._parts)

    def enter(self, number: int, *_: Any) -> None:
        """Prepare one layer for a forward or backward pass; no other layer needs to be whole."""
        self.free(but=number)
        self._parts[number].fill()

    def free(self, *, but: int | None = None) -> None:
        """Free all layers, or all but one."""
        for number, part in enumerate(self._parts):
            if number != but:
                part.free()

    def fill(self) -> None:
        """Gather all layers."""
        for part in self._parts:
            part.fill()


def _before_backward(enter: Callable[..., None], layer: Any, inputs: Any, output: Any) -> None:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    if first.requires_grad:
        first.register_hook(enter)  # type: ignore[no-untyped-call]


@contextmanager
def sharded(
    layers: Sequence[torch.nn.Module], trained: set[int], processes: Processes
) -> Iterator[Shards | None]:
    """Inside the ``with``, each process holds its part of the layers' weights.

    Args:
        layers: of the model, in the order in which they run.
        trained: ``id`` of every parameter that stays whole.
        processes: which divide the weights; None is yielded where there is but one.
    """
    if processes.count == 1:
        yield None
        return
    uses = Counter(id(p) for layer in layers for p in layer.parameters())
    groups = [
        [p for p in layer.parameters() if uses[id(p)] == 1 and id(p) not in trained]
        for layer in layers
    ]
    parts, handles = [], []
    for group in groups:
        for parameter in group:
            storage = parameter.untyped_storage()
            own = storage.nbytes() == parameter.numel() * parameter.element_size()
            if not (own and storage.resizable() and parameter.is_contiguous()):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        parts.append(Part(group, processes))
    shards = Shards(parts)
    for number, layer in enumerate(layers):
        enter = partial(shards.enter, number)
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(partial(_before_backward, enter)))
    try:
        shards.free()
        try:
            yield shards
        except GainlensError:  # raised by every process alike, so that all gather
            shards.fill()
            raise
        shards.fill()
    finally:
        for handle in handles:
            handle.remove()
