"""Active slices: the trained rows of the weights as separate tensors.

A slice is a leaf tensor with only the trained rows of one parameter, so only these have a gradient,
optimiser state and weight decay. While the student runs, a full-width tensor made from the slice
replaces the parameter: trained rows come from the slice, ghost rows are zero, so whole rotary pairs
of queries and keys add nothing to any logit. The parameter itself is written only after the run, so
the intact model can run at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

Layout = Literal["rows", "columns", "heads"]
"""Where a parameter keeps its output units: first axis, last axis (GPT-2), or head by head."""

Place = tuple[torch.nn.Module, str]


def to_rows(tensor: Float[torch.Tensor, "..."], layout: Layout) -> Float[torch.Tensor, "row ..."]:
    """One row per output unit, ``[row, d_model]`` or ``[row]``; a view where it can be."""
    if layout == "columns" and tensor.ndim == 2:
        return tensor.T
    if layout == "heads":
        return tensor.transpose(1, 2).flatten(0, 1) if tensor.ndim == 3 else tensor.flatten()
    return tensor


def from_rows(
    rows: Float[torch.Tensor, "row ..."], shape: torch.Size, layout: Layout
) -> Float[torch.Tensor, "..."]:
    """The inverse of ``to_rows``."""
    if layout == "columns" and len(shape) == 2:
        return rows.T
    if layout == "heads":
        if len(shape) == 3:
            return rows.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
        return rows.reshape(shape)
    return rows


@dataclass(eq=False)
class Slice:
    """The trained part of one parameter.

    Attributes:
        name: name of the parameter.
        group: ``qk``, ``other`` or ``frequencies``; each has its own learning rate.
        stored: the parameter, unchanged until ``write``.
        places: every module attribute that holds it (tied weights have two).
        layout: see ``Layout``.
        trained: the rows in ``leaf``; None for the whole parameter.
        leaf: their values, float32 or wider; None if nothing of the parameter is trained.
        rest: all rows, for those that are not trained: ghosts zero, refitted rows with their new
            values; None where every other row is zero.
        written: rows that ``write`` puts into the parameter.
        below: another slice of the same parameter, whose rows this one leaves as they are.
    """

    name: str
    group: str
    stored: torch.nn.Parameter
    places: list[Place]
    layout: Layout = "rows"
    trained: Int[torch.Tensor, " trained"] | None = None
    leaf: Float[torch.Tensor, "..."] | None = None
    rest: Float[torch.Tensor, "..."] | None = None
    written: Int[torch.Tensor, " written"] | None = None
    below: Slice | None = None
    before: Float[torch.Tensor, "..."] | None = field(default=None, repr=False)

    def full(self) -> Float[torch.Tensor, "..."]:
        """The full-width tensor that stands in for the parameter, ghosts zero."""
        if self.trained is None:
            assert self.leaf is not None
            return self.leaf.to(self.stored.dtype)
        rows = self._rest()
        if self.leaf is not None:
            rows = rows.index_copy(0, self.trained, self.leaf.to(rows.dtype))
        return from_rows(rows, self.stored.shape, self.layout)

    def _rest(self) -> torch.Tensor:
        if self.below is not None:
            return to_rows(self.below.full(), self.layout)
        if self.rest is not None:
            return self.rest
        shape = to_rows(self.stored.detach(), self.layout).shape
        return self.stored.new_zeros(shape, requires_grad=False)

    @torch.no_grad()
    def go_on_from(self, earlier: Slice) -> None:
        """Take the present values of a slice of the same parameter, which had all these rows."""
        if self.trained is None:
            assert self.leaf is not None
            assert earlier.leaf is not None
            self.leaf.copy_(earlier.leaf)
            return
        present = earlier.leaf if earlier.trained is None else earlier.full()
        assert present is not None
        rows = to_rows(present.detach(), self.layout)
        if self.rest is not None and self.written is not None:
            self.rest[self.written] = rows[self.written].to(self.rest.dtype)
            self.rest[self.trained] = 0
        if self.leaf is not None:
            wide = rows.to(self.leaf.dtype)
            if earlier.leaf is not None and earlier.trained is not None:  # what rounding would lose
                wide = wide.index_copy(0, earlier.trained, earlier.leaf.to(wide.dtype))
            self.leaf.copy_(wide[self.trained])

    @torch.no_grad()
    def write(self) -> None:
        """Write the active rows into the parameter; all other bits stay unchanged."""
        new = self.full()
        if self.written is None:
            self.before = self.stored.detach().clone()
            self.stored.copy_(new)
            return
        rows = to_rows(self.stored.detach(), self.layout).clone()
        self.before = rows[self.written]
        rows[self.written] = to_rows(new, self.layout)[self.written]
        self.stored.copy_(from_rows(rows, self.stored.shape, self.layout))

    @torch.no_grad()
    def intact(self) -> Float[torch.Tensor, "..."]:
        """The parameter as it was before ``write``."""
        if self.before is None:
            return self.stored.detach()
        if self.written is None:
            return self.before
        present = self.stored.detach() if self.below is None else self.below.intact()
        rows = to_rows(present, self.layout).clone()
        rows[self.written] = self.before
        return from_rows(rows, self.stored.shape, self.layout)


@contextmanager
def swapped(tensors: list[tuple[Slice, torch.Tensor]]) -> Iterator[None]:
    """Inside the ``with``, ``tensors`` replace their parameters."""
    try:
        for part, tensor in tensors:
            for module, leaf in part.places:
                module._parameters[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for part, _ in tensors:
            for module, leaf in part.places:
                module._parameters[leaf] = part.stored


def places_of(root: torch.nn.Module) -> dict[int, list[Place]]:
    """Where each parameter of ``root`` is held, by ``id``."""
    found: dict[int, list[Place]] = {}
    for module in root.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    return found


@contextmanager
def frozen(root: torch.nn.Module) -> Iterator[None]:
    """Turn off gradients of all stored parameters inside the ``with``."""
    wanted = [p for p in root.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def shown(slices: list[Slice]) -> list[Slice]:
    """Those that stand in for their parameters, without the ones that others are made of."""
    below = {id(part.below) for part in slices}
    return [part for part in slices if id(part) not in below]


def leaves(slices: list[Slice]) -> list[torch.Tensor]:
    """The trained tensors, in order."""
    return [part.leaf for part in slices if part.leaf is not None]


def module_at(owner: Any, name: str) -> Any | None:
    """``owner.name`` or None, through a bridge's wrapper to the module that holds the weight."""
    found = getattr(owner, name, None)
    return getattr(found, "original_component", found)
