"""bfloat16 copies of the matrices that a run does not train."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

import torch

from gainlens.training.slices import Slice, places_of, swapped


class Halves:
    """Stand-ins for the untrained matrices of linear modules, cast once.

    ``torch.autocast`` keeps the cast of a weight only if the weight takes a gradient. All others
    it casts for each product: the output head once for every few positions. The products are the
    same to the bit. Embeddings stay as they are, since the residual stream is in float32.

    Args:
        root: the model; its parameters must not change while this is in use.
        trained: ``id`` of each parameter that is trained, which keeps its own.
    """

    def __init__(self, root: torch.nn.Module, trained: Collection[int]) -> None:
        stored = {id(parameter): parameter for parameter in root.parameters()}
        self._parts: list[Slice] = []
        for key, places in places_of(root).items():
            linear = [place for place in places if type(place[0]) is torch.nn.Linear]
            if linear and key not in trained and stored[key].dtype == torch.float32:
                self._parts.append(Slice(linear[0][1], "other", stored[key], linear))
        self._copies: list[tuple[Slice, torch.Tensor]] = []

    def swapped(self) -> AbstractContextManager[None]:
        """Inside the ``with``, the copies, made for the first one, replace their matrices."""
        if not self._copies:
            self._copies = [(p, p.stored.detach().to(torch.bfloat16)) for p in self._parts]
        return swapped(self._copies)
