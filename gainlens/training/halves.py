"""bfloat16 copies of the matrices that a run does not train."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from gainlens.training.slices import places_of


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
        self._places = [
            (module, leaf, stored[key])
            for key, places in places_of(root).items()
            for module, leaf in places
            if type(module) is torch.nn.Linear
            and key not in trained
            and stored[key].dtype == torch.float32
        ]
        self._copies: list[torch.Tensor] = []

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the ``with``, the copies, made for the first one, replace their matrices."""
        if not self._copies:
            self._copies = [weight.detach().to(torch.bfloat16) for *_, weight in self._places]
        try:
            for (module, leaf, _), copy in zip(self._places, self._copies, strict=True):
                module._parameters[leaf] = copy  # type: ignore[assignment]
            yield
        finally:
            for module, leaf, weight in self._places:
                module._parameters[leaf] = weight
