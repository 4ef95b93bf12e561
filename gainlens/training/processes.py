"""Several processes that train or probe together, data parallel.

Started by ``accelerate launch`` or ``torchrun``. Every process has its own documents, and the
whole model or (``gainlens.training.sharding``) its part of it; gradients of the active slices, and
gains, are summed over all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import add
from typing import Any

import torch
import torch.distributed as dist

from gainlens.data.batches import Tokens
from gainlens.model.tokens import model_documents
from gainlens.probes import KeyGains, probe_gains


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @classmethod
    def here(cls) -> Processes:
        """The launched group of processes, or a single process."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _initialise()
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[Any]) -> list[Any]:
        """The items of this process; every item belongs to exactly one process."""
        return list(items[self.rank :: self.count])

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes.

        With several GPUs, tensors on the CPU are copied to the GPU, summed there and copied back.
        """
        if self.count == 1:
            return
        graphic = str(dist.get_backend()) == "nccl"
        for tensor in tensors:
            if graphic and not tensor.is_cuda:
                there = tensor.cuda()
                dist.all_reduce(there)
                tensor.copy_(there)
            else:
                dist.all_reduce(tensor)

    def most(self, number: int) -> int:
        """Maximum of ``number`` over all processes."""
        found: list[int] = self.gathered(number)
        return max(found)

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every process, in order, on every process."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all processes arrive."""
        if self.count > 1:
            dist.barrier()


def _initialise() -> None:
    try:
        accelerate: Any = import_module("accelerate")
        accelerate.PartialState()
    except ImportError:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def gather_gains(model: Any, tokens: Tokens, scores: Sequence[str], **kwargs: Any) -> KeyGains:
    """``probe_gains`` with the documents divided among all processes; the same gains on each.

    Args:
        model, tokens, scores, kwargs: as for ``probe_gains``; the same on every process.

    Returns:
        The gains of all documents, added in the order of the processes.
    """
    processes = Processes.here()
    documents = model_documents(model, tokens)
    mine = processes.share(documents)
    part = probe_gains(model, mine, tuple(scores), **kwargs) if mine else None
    parts: list[KeyGains] = [g for g in processes.gathered(part) if g is not None]
    return reduce(add, parts)
