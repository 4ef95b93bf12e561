"""What makes a file one of ours: its format, its kind, and a checksum of its content."""

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
    """JSON text of plain values.

    Raises:
        InputError: NaN, infinity, or something that JSON has no word for; names ``what``.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} can't be written as JSON: {error}; expected plain values, no NaN"
        ) from None


def sealed(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with its format, kind and checksum: what ``opened`` takes.

    Raises:
        InputError: ``value`` is not plain JSON.
    """
    whole = {"format": FORMAT, "kind": kind, **value}
    return {**whole, CHECKSUM: _checksum(whole, kind)}


def opened(value: Any, kind: str, where: str) -> dict[str, Any]:
    """The content of what ``sealed`` made, format, kind and checksum taken off.

    Args:
        value: as read from a file.
        kind: that it must be of.
        where: what the message calls it.

    Raises:
        FileFormatError: another kind or format, or changed since it was written.
    """
    if not isinstance(value, dict):
        raise FileFormatError(f"{where} is not a gainlens {kind} file: it holds no JSON object")
    check_kind(value, kind, where)
    whole = {key: found for key, found in value.items() if key != CHECKSUM}
    if value.get(CHECKSUM) != _checksum(whole, where):
        raise FileFormatError(damaged(where))
    return {key: found for key, found in whole.items() if key not in ("format", "kind")}


def check_kind(header: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise ``FileFormatError`` unless a header says this format and kind."""
    if header.get("format") != FORMAT or header.get("kind") != kind:
        raise FileFormatError(
            f"{where} is not a gainlens file of kind {kind!r} (format {FORMAT}): it says "
            f"{_short(header.get('kind'))}, {_short(header.get('format'))}"
        )


def damaged(where: str) -> str:
    """The message for content that is not what was written."""
    return f"{where} is damaged: its content does not match its checksum"


def tensors_checksum(kind: str, tensors: Mapping[str, torch.Tensor], facts: str) -> str:
    """SHA-256, in hexadecimal, of tensors by name and of the text of the facts.

    Args:
        kind: of the file.
        tensors: of any shape, on the CPU, contiguous.
        facts: JSON text as it stands in the file.
    """
    digest = hashlib.sha256(f"{FORMAT} {kind} {facts}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(value: Any, what: str) -> str:
    # Through JSON once: keys that are numbers become text before they are sorted.
    plain = json.loads(as_json(value, what))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
