"""From documents to token ids, reading no more of a document than is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gainlens.data.splits import Document
from gainlens.errors import InputError

BATCH = 16
"""Documents per tokenizer call."""
SLACK = 64
"""Tokens before the end of a truncated text that may differ in the full text's tokenization."""


def encoded(chosen: Iterable[Document], tokenizer: Any, most: int | None) -> Iterator[list[int]]:
    """Tokens of each document.

    Args:
        chosen: documents.
        tokenizer: of the model.
        most: how many tokens of each are wanted; None for all.
    """
    batch: list[str] = []
    for document in chosen:
        batch.append(document.text)
        if len(batch) == BATCH:
            yield from _encode(batch, tokenizer, most)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer, most)


def _encode(texts: list[str], tokenizer: Any, most: int | None) -> list[list[int]]:
    """Tokens of each text, or its first ``most`` tokens, reading no more text than needed."""
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
    # verbose=False suppresses the context length warning: windows never exceed the context.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def default_prefix(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer prepends by default, usually none or one."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model, or the tokenizer that was given in its place.

    Raises:
        InputError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer
    if callable(model) and hasattr(model, "encode") and hasattr(model, "decode"):
        return model
    raise InputError(
        f"model of type {type(model).__name__} has no tokenizer; expected a model from "
        "load_model, or a tokenizer"
    )
