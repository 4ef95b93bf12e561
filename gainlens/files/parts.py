"""Output is written to a locked hidden folder (a part) next to its destination.

The lock ends with its process, so the next run with the same output recognises the parts of dead
runs and removes them. Windows has no such locks: there nothing is removed, and concurrent writers
are not detected.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from gainlens.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NEW, WHOLE, OLD = "new", "whole", "old"
"""Names inside a part: the output being written, the complete output, the content it replaces."""
_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())


def cant_write(what: str, error: BaseException) -> InputError | None:
    """The error to raise if writing failed (disk full, permissions); None for other errors."""
    if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
        return None
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is None:
        reason = f"the disk is full ({reason})"  # numpy's message only has the byte counts
    return InputError(f"{what} can't be written: {reason}")


def check_writable(folder: str | Path) -> Path:
    """Create ``folder`` if needed and return it.

    Raises:
        InputError: the folder can't be created or written, or is a file.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"folder {str(folder)!r} can't be written: {error.strerror or error}"
        ) from None
    return folder


@contextmanager
def part_of(target: Path, where: Path) -> Iterator[Path]:
    """A hidden folder in ``where`` for the future ``target``; those of dead runs are removed.

    Its mode follows the umask and serves as the reference for new files and folders.
    """
    remove_dead(target, where)
    while True:
        part = where / f".{target.name}.{secrets.token_hex(4)}.part"
        os.mkdir(part, 0o777)
        lock = None
        with suppress(OSError):  # the file system has no locks, or the part was already removed
            lock = _lock(part, wait=True)
        if lock is None or _is_at(lock, part):
            break
        os.close(lock)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def part_name(target: Path) -> re.Pattern[str]:
    """Pattern for the names of the parts of ``target``."""
    return re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.part")


def remove_dead(target: Path, where: Path) -> None:
    """Finish or remove the parts of ``target`` in ``where`` left by dead processes."""
    name, parts = part_name(target), []
    with suppress(OSError), os.scandir(where) as entries:  # the folder may not be listable
        parts = [Path(e.path) for e in entries if name.fullmatch(e.name) and e.is_dir()]
    for part in parts:
        with suppress(OSError):  # removed since the listing
            lock = _lock(part, wait=False)
            if lock is None:
                continue
            try:
                _finish(part, target, inside=where == target)
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(lock)


def _finish(part: Path, target: Path, *, inside: bool) -> None:
    """Finish or undo the move of a run that died while putting its folder in place."""
    if inside and (part / WHOLE).is_dir():
        move_entries(part / WHOLE, target)
    elif inside and (part / OLD).is_dir():
        move_entries(part / OLD, target)
    elif (part / OLD).is_dir() and not target.exists():
        os.rename(part / OLD, target)


def move_entries(
    source: Path, target: Path, last: tuple[str, ...] = (), but: Path | None = None
) -> None:
    """Move all entries of ``source`` except ``but`` into ``target``, the names in ``last`` last.

    If that fails, everything is moved back to ``source``.
    """
    entries = [entry for entry in source.iterdir() if entry != but]
    moved: list[Path] = []
    try:
        for entry in sorted(entries, key=lambda e: (e.name in last, e.name)):
            os.replace(entry, target / entry.name)
            moved.append(entry)
    except BaseException:
        for entry in moved:
            os.replace(target / entry.name, entry)
        raise


@contextmanager
def locked(target: str | Path) -> Iterator[None]:
    """Lock ``target``, a file or a folder, against other processes; its parents are created.

    The lock is reentrant. Created parents that are still empty at the end are removed.

    Raises:
        InputError: another process is writing ``target``, or it can't be written.
    """
    path = Path(os.path.realpath(target))
    if path in _held.get():
        yield
        return
    made: list[Path] = []
    file, lock = path.parent / f".{path.name}.lock", None
    try:
        _make_parents(path, made)
        if path.is_dir() and not os.access(path.parent, os.W_OK):
            file = path  # lock the folder itself
        lock = _lock_file(file, path)
        for where in (path.parent, path):
            if where.is_dir():
                remove_dead(path, where)
    except OSError as error:
        _remove(made)
        raise cant_write(f"folder {str(path.parent)!r}", error) or error from error
    except InputError:
        _remove(made)
        raise
    token = _held.set(_held.get() | {path})
    try:
        yield
    finally:
        _held.reset(token)
        if lock is not None:
            if file != path:
                file.unlink(missing_ok=True)
            os.close(lock)
        _remove(made)


def _lock_file(file: Path, target: Path) -> int | None:
    if fcntl is None:
        return None
    while True:
        if not file.is_dir():
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        try:
            lock = _lock(file, wait=False)
        except FileNotFoundError:  # the previous holder has just removed it
            continue
        except OSError:  # a file system without locks
            return None
        if lock is None:
            raise InputError(
                f"{target} is being written by another process: wait for it, or name another output"
            )
        if _is_at(lock, file):
            return lock
        os.close(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a file or folder; None if another process has it."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _make_parents(target: Path, made: list[Path]) -> None:
    """Create the folders above ``target``, appending each new one to ``made``."""
    missing = []
    parent = target.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        made.append(parent)


def _remove(folders: list[Path]) -> None:
    with suppress(OSError):  # they are no longer empty
        for folder in reversed(folders):
            folder.rmdir()
