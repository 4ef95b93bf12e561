"""``Texts``: tokens of several texts or lengths, with the source of each document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Int

from gainlens.errors import InputError


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
        return self.chosen([i for i, domain in enumerate(self.domains) if domain == name])

    def chosen(self, indices: Sequence[int]) -> Texts:
        """Some of the documents, by index."""
        return Texts(
            tuple(self.rows[i] for i in indices),
            tuple(self.domains[i] for i in indices),
            tuple(self.groups[i] for i in indices),
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


def groups_for(tokens: Any, groups: Sequence[int] | None, n_documents: int) -> tuple[int, ...]:
    """The group of each document: as given, else as loaded; empty if all are independent.

    Args:
        tokens: a text.
        groups: a whole number per document, or None.
        n_documents: how many documents there are.

    Raises:
        InputError: not one whole number of 0 or above per document.
    """
    if groups is None:
        found = groups_of(tokens) or ()
        return found if len(set(found)) < len(found) else ()
    found = tuple(int(group) for group in groups)
    if len(found) != n_documents or any(group < 0 for group in found):
        raise InputError(
            f"groups has {len(found)} numbers, the lowest {min(found, default=0)}: expected one of "
            f"0 or above for each of the {n_documents} documents"
        )
    return found


def groups_of(tokens: Any) -> tuple[int, ...] | None:
    """The group of each row (windows of one document share one), or None if unknown."""
    return tokens.groups if isinstance(tokens, Texts) else None
