"""Read untrusted files: regular files only, in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import torch

from gainlens.errors import FileFormatError
from gainlens.files.content import check_kind, damaged, tensors_checksum

MAX_JSON = 64 << 20
"""Maximum size of a JSON file in bytes."""
MAX_DEPTH = 64
"""Maximum nesting depth of JSON."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


def check_regular(path: str | Path) -> int:
    """The size in bytes of a regular file.

    Raises:
        FileFormatError: the path is missing, or is a folder, pipe or device.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path} can't be read: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{path} can't be read: expected a regular file")
    return found.st_size


def read_text(path: str | Path, limit: int = MAX_JSON) -> str:
    """The text of a regular file.

    Args:
        path: path of the file.
        limit: maximum size in bytes.

    Raises:
        FileFormatError: the file is missing, too large, or not UTF-8.
    """
    size = check_regular(path)
    if size > limit:
        raise FileFormatError(f"{path} has {size:,} bytes: expected at most {limit:,}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} can't be read: {error}") from None


def read_json(path: str | Path, limit: int = MAX_JSON) -> Any:
    """Read JSON.

    Args:
        path: path of a regular file.
        limit: maximum size in bytes.

    Raises:
        FileFormatError: the file is missing, too large, nested too deeply, or not JSON.
    """
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON that is nested at most ``MAX_DEPTH`` deep and holds no NaN.

    Raises:
        FileFormatError: the text is not such JSON; the message names ``where``.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(text)
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} can't be read as JSON: {error}") from None


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file written by ``save_tensors`` with the same ``kind``.

    Raises:
        FileFormatError: the file is missing, truncated or changed, or has another kind or version.
    """
    from safetensors import safe_open

    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            check_kind(header, kind, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts, checksum = header["facts"], header["checksum"]
        if tensors_checksum(kind, tensors, facts) != checksum:
            raise FileFormatError(damaged(str(path)))
        return tensors, parse_json(facts, str(path))
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(
            f"{path} can't be read as a gainlens {kind} file: {' '.join(str(error).split())}"
        ) from None


def file_kind(path: str | Path) -> str:
    """The kind recorded in a file written by ``save_tensors``.

    Raises:
        FileFormatError: the file is missing, truncated, or not a gainlens file.
    """
    from safetensors import safe_open

    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("kind", ""))
    except Exception as error:
        raise FileFormatError(
            f"{path} can't be read as a gainlens file: {' '.join(str(error).split())}"
        ) from None


def _check_depth(text: str) -> None:
    depth = 0
    for match in _TOKEN.finditer(text):
        first = match[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}")
