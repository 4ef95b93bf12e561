"""The sweep file: one line of JSON per finished point, so that a killed sweep can resume.

The first line identifies the model, text, gains and points of the sweep. Each further line is
written, flushed and synced before the next point starts. If the process was killed, the last line
may be incomplete; it is removed and its point is run again. Nothing in the file depends on when or
how often the sweep was started, so an interrupted sweep gives the same bytes as an uninterrupted
one.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.errors import FileFormatError, InputError
from gainlens.files import FORMAT, check_writable, locked
from gainlens.files.content import as_json
from gainlens.files.reading import check_regular, parse_json
from gainlens.files.schema import listing, number

KIND = "surgery-sweep"
CHECK = "check"


class SweepFile:
    """Append-only record of a sweep; a context manager that locks the file for other processes.

    Args:
        path: path of the file, which is created if it does not exist.
        header: identity of the sweep, as plain JSON values.

    Attributes:
        done: losses of the finished lines in order; the first is the intact model.

    Raises:
        InputError: the file belongs to another sweep (the message names the first field that
            differs), is not writable, or is being written by another process.
        FileFormatError: it is not a sweep file, or is damaged before its last line.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self._header = json.loads(as_json({"format": FORMAT, "kind": KIND, **header}, "header"))
        check_writable(self.path.parent)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            self.done: list[Float[np.ndarray, " document"]] = self._recover()
            self._lock = stack.pop_all()

    def __enter__(self) -> SweepFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _recover(self) -> list[Float[np.ndarray, " document"]]:
        if not self.path.exists():
            self._append(self._header)
            return []
        check_regular(self.path)
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        parsed = []
        for place, line in enumerate(lines, 1):
            try:
                parsed.append(_unsealed(line))
            except (FileFormatError, ValueError):
                raise FileFormatError(
                    f"{self.path} is damaged in line {place}; only its last line may be incomplete"
                ) from None
        if parsed:
            self._check_header(parsed[0])
        elif content and not _line(self._header).encode().startswith(content):
            raise FileFormatError(f"{self.path} is not a gainlens sweep file")
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        if not parsed:
            self._append(self._header)
            return []
        return [self._losses(row, index) for index, row in enumerate(parsed[1:])]

    def _check_header(self, found: Any) -> None:
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise FileFormatError(f"{self.path} is not a gainlens sweep file")
        for key in {**self._header, **found}:
            if found.get(key) != self._header.get(key):
                raise InputError(
                    f"out={str(self.path)!r} contains a sweep with another {key}: "
                    f"{_short(found.get(key))} there, {_short(self._header.get(key))} now; "
                    "use another file, or remove this one"
                )

    def _losses(self, row: Any, index: int) -> Float[np.ndarray, " document"]:
        try:
            if row.get("index") != index:
                raise ValueError(f"index {row.get('index')}, expected {index}")
            listing(number())(row["losses"], "losses")
            losses = np.array(row["losses"], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{self.path} is damaged in line {index + 2}: {error}") from None
        return losses

    def check_lengths(self, n_lines: int, n_documents: int, looks: tuple[int, ...] = ()) -> None:
        """Check that every line has the losses of all documents, or of those up to a look.

        Args:
            n_lines: number of points in the sweep, including the intact model.
            n_documents: number of validation documents.
            looks: numbers of documents after which a point may have stopped.

        Raises:
            FileFormatError: a line is wrong; the message names it.
        """
        for index, losses in enumerate(self.done):
            fits = len(losses) == n_documents or (index > 0 and len(losses) in looks)
            if not fits or index >= n_lines:
                self._lock.close()
                raise FileFormatError(
                    f"{self.path} is damaged in line {index + 2}: it has {len(losses)} losses of "
                    f"point {index + 1}, expected {n_documents} of each of {n_lines} points"
                )

    def add(self, losses: Float[np.ndarray, " document"]) -> None:
        """Write the next point; it is on disk when this returns."""
        self._append({"index": len(self.done), "losses": losses.tolist()})
        self.done.append(losses)

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(_line(row).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _line(row: dict[str, Any]) -> str:
    """A row as written to the file: JSON with its own checksum at the end."""
    text = as_json(row, "losses", separators=(",", ":"))
    return f'{text[:-1]},"{CHECK}":"{_digest(text)}"}}\n'


def _unsealed(line: bytes) -> Any:
    """Read a line from ``_line``, without its checksum; ``ValueError`` if that is wrong."""
    row = parse_json(line, "line")
    if not isinstance(row, dict):
        raise ValueError("not a row")
    check = row.pop(CHECK, None)
    if check != _digest(json.dumps(row, separators=(",", ":"))):
        raise ValueError("changed since it was written")
    return row


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
