"""Assign documents to splits. Near-duplicates always belong to the same split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from gainlens.data.pieces import letter_pieces

Split = Literal["calibration", "training", "validation"]
SPLITS: dict[str, range] = {
    "calibration": range(0, 25),
    "training": range(25, 60),
    "validation": range(60, 100),
}
"""Percentages of all documents. Gains are gathered on the first split, a cut model is trained on
the second, and results are evaluated on the third only."""

LETTERS = 2**22
"""Characters of a document that identify it; text after the first four million is ignored."""
ALIKE, FEWEST = 0.5, 4
"""Two documents are near-duplicates if they share this fraction of the shorter one's pieces;
``FEWEST`` is the minimum number of pieces for this test."""
OPENINGS = (150, 300, 1000)
"""Lengths in characters of the document openings that are also compared."""
SHOWN = 8
"""Up to this many documents with a common piece, every pair is counted; above, only neighbours."""


@dataclass(frozen=True, order=True)
class Document:
    """One document. Documents sort by their hashes."""

    digest: str
    text: str

    @staticmethod
    def of(text: str) -> Document:
        """The document of ``text``, with surrounding white space stripped and ``\\n`` line ends.

        Lone surrogates, which no tokenizer accepts, become replacement characters.
        """
        plain = text.replace("\r\n", "\n").strip()
        if not plain.isascii():
            plain = plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        head = plain[:LETTERS]
        return Document(hashlib.sha256(head.encode()).hexdigest(), plain)

    @cached_property
    def pieces(self) -> np.ndarray:
        """Hashes of its overlapping pieces, in ascending order."""
        return letter_pieces(self.text[:LETTERS])

    @property
    def key(self) -> str:
        """Decides its split if it has no near-duplicate: its smallest piece, or its hash."""
        return f"{int(self.pieces[0]):x}" if len(self.pieces) >= FEWEST else self.digest

    @property
    def split(self) -> str:
        """Its split, if no other document is a near-duplicate."""
        return split_of(self.key)


def split_of(key: str) -> str:
    """The split of all documents with one key."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def keys_of(documents: Sequence[Document]) -> list[str]:
    """The key of each document; near-duplicates share the smallest of their keys.

    Two documents are near-duplicates if the longer one contains half of the shorter one's pieces,
    if their openings match in the same way (rows of tokens are usually taken there), or if both
    are near-duplicates of a third. The order of documents makes no difference.
    """
    parents = list(range(len(documents)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    order = sorted(range(len(documents)), key=lambda i: documents[i].digest)
    wholes = [document.pieces for document in documents]
    heads = ([letter_pieces(document.text[:n]) for document in documents] for n in OPENINGS)
    for pieces in (wholes, *heads):
        for (i, j), count in _shared(pieces, order).items():
            fewer = min(len(pieces[i]), len(pieces[j]))
            if fewer >= FEWEST and count >= ALIKE * fewer:
                parents[root(i)] = root(j)
    least: dict[int, str] = {}
    for i, document in enumerate(documents):
        at = root(i)
        least[at] = min(least.get(at, document.key), document.key)
    return [least[root(i)] for i in range(len(documents))]


def _shared(found: Sequence[np.ndarray], order: Sequence[int]) -> Counter[tuple[int, int]]:
    """The number of common pieces per pair of documents; each pair follows ``order``."""
    counts: Counter[tuple[int, int]] = Counter()
    if not found:
        return counts
    pieces = np.concatenate([found[i] for i in order])
    owners = np.repeat(order, [len(found[i]) for i in order])
    by_piece = np.argsort(pieces, kind="stable")
    pieces, owners = pieces[by_piece], owners[by_piece]
    starts = np.flatnonzero(np.r_[True, pieces[1:] != pieces[:-1]])
    ends = np.r_[starts[1:], len(pieces)]
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several], strict=True):
        group = owners[start:end].tolist()
        if len(group) <= SHOWN:
            pairs = ((a, b) for n, a in enumerate(group) for b in group[n + 1 :])
            counts.update(pairs)
        else:
            counts.update(pairwise(group))
    return counts
