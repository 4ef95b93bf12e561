"""The format, kind and content checksum that identify a gainlens file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from gainlens.errors import FileFormatError, InputError

FORMAT = "gainlens-2"
CHECKSUM = "checksum"


def as_json(value: Any, what: str, **options: Any) -> str:
    """JSON text of a JSON-serialisable value.

    Raises:
        InputError: the value holds NaN, infinity or a type that JSON can't represent; the message
            names ``what``.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} can't be written as JSON: {error}; expected plain values, no NaN"
        ) from None


def sealed(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with format, kind and checksum added; the inverse of ``opened``.

    Raises:
        InputError: ``value`` is not JSON-serialisable.
    """
    whole = {"format": FORMAT, "kind": kind, **value}
    return {**whole, CHECKSUM: _checksum(whole, kind)}


def opened(value: Any, kind: str, where: str) -> dict[str, Any]:
    """The content of a value made by ``sealed``, without format, kind and checksum.

    Args:
        value: the value read from a file.
        kind: the expected kind.
        where: name of the file, for the message.

    Raises:
        FileFormatError: the kind or format is wrong, or the content was changed after writing.
    """
    if not isinstance(value, dict):
        raise FileFormatError(f"{where} is not a gainlens {kind} file: it holds no JSON object")
    check_kind(value, kind, where)
    whole = {key: found for key, found in value.items() if key != CHECKSUM}
    if value.get(CHECKSUM) != _checksum(whole, where):
        raise FileFormatError(damaged(where))
    return {key: found for key, found in whole.items() if key not in ("format", "kind")}


def check_kind(header: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise ``FileFormatError`` unless a header has this format and kind."""
    if header.get("format") != FORMAT or header.get("kind") != kind:
        raise FileFormatError(
            f"{where} is not a gainlens file of kind {kind!r} (format {FORMAT}): its header has "
            f"{_short(header.get('kind'))}, {_short(header.get('format'))}"
        )


def damaged(where: str) -> str:
    """The error message for content that does not match its checksum."""
    return f"{where} is damaged: its content does not match its checksum"


def tensors_checksum(kind: str, tensors: Mapping[str, torch.Tensor], facts: str) -> str:
    """Hexadecimal SHA-256 of named tensors and of the text of the facts.

    Args:
        kind: kind of the file.
        tensors: contiguous CPU tensors of any shape.
        facts: JSON text exactly as in the file.
    """
    digest = hashlib.sha256(f"{FORMAT} {kind} {facts}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(value: Any, what: str) -> str:
    # A round trip through JSON turns numeric keys into strings before sorting.
    plain = json.loads(as_json(value, what))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
