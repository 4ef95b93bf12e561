"""``Texts``: tokens of several texts or lengths, with the source of each document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class Texts(Sequence[torch.Tensor]):
    """Documents of token ids, with the name of each document's source text.

    It is a sequence of documents and can be passed wherever tokens are expected.

    Attributes:
        rows: token ids of each row, ``[pos]``.
        domains: the name of each row's text.
        groups: a number per row, equal for windows of one document, which are not independent.
    """

    rows: tuple[torch.Tensor, ...]
    domains: tuple[str, ...]
    groups: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Texts(self.rows[index], self.domains[index], self.groups[index])
        return self.rows[index]

    def __repr__(self) -> str:
        lengths = sorted({len(row) for row in self.rows})
        return (
            f"Texts({len(self)} documents of {', '.join(self.names)}, {lengths[0]} to "
            f"{lengths[-1]} tokens)"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the texts, in order of first appearance."""
        return tuple(dict.fromkeys(self.domains))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(len(row) for row in self.rows)

    def of(self, name: str) -> Texts:
        """The documents of one text."""
        chosen = [i for i, domain in enumerate(self.domains) if domain == name]
        return Texts(
            tuple(self.rows[i] for i in chosen),
            tuple(self.domains[i] for i in chosen),
            tuple(self.groups[i] for i in chosen),
        )

    def stacked(self) -> Int[torch.Tensor, "row pos"]:
        """All rows as one tensor; they must have the same length."""
        return torch.stack(self.rows)


def as_rows(tokens: torch.Tensor | Texts) -> Int[torch.Tensor, "row pos"]:
    """The result of ``load_tokens`` as one tensor; all rows must have the same length."""
    return tokens.stacked() if isinstance(tokens, Texts) else tokens


def domains_of(tokens: Any) -> tuple[str, ...] | None:
    """The name of each document's text, or None if ``tokens`` doesn't have it."""
    return tokens.domains if isinstance(tokens, Texts) else None


def groups_of(tokens: Any) -> tuple[int, ...] | None:
    """The group of each row (windows of one document share one), or None if unknown."""
    return tokens.groups if isinstance(tokens, Texts) else None
