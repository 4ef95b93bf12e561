"""Write a folder completely or not at all, also in place of an empty or an old one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gainlens.errors import FileFormatError, GainlensError
from gainlens.files.parts import NEW, OLD, WHOLE, cant_write, locked, move_entries, part_of
from gainlens.files.reading import read_text
from gainlens.files.writing import check_free

SUMS = "SHA256SUMS"
LAST = ("config.json", "index.html", SUMS)
"""Files moved last if a folder can't appear in one step, because readers open them first."""
_AT_FDCWD, _EXCHANGE = -100, 2


@contextmanager
def written_folder(
    folder: str | Path, name: str = "folder", *, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder to be filled; unless an exception is raised, it becomes ``folder``.

    The folder appears in one step, with the checksums of its files in ``SHA256SUMS``; file modes
    follow the umask. On Linux, an old folder is exchanged for the new one atomically. Elsewhere,
    there is a moment with neither; if the process dies then, the next run restores the old folder.
    Some folders can't be replaced (a mounted disk, the current directory, another user's folder,
    or one with an unwritable parent). They are filled entry by entry, with the files that readers
    open first at the end; if the process dies in between, the next run finishes the move.

    Args:
        folder: a new or empty folder; with ``replace``, it may have content to replace.
        name: name of the argument, for messages.
        replace: whether to replace an existing folder.

    Raises:
        InputError: the folder is not empty, another process is writing it, it can't be written, or
            the disk is full. No partial output is left.
    """
    target = Path(os.path.realpath(folder))
    what = f"{name} {str(folder)!r}"
    try:
        with locked(target):
            if not (replace and target.is_dir()):
                check_free(target, name)
            inside = target.is_dir() and _must_stay(target)
            with part_of(target, target if inside else target.parent) as part:
                new = part / NEW
                new.mkdir()
                yield new
                _tidy(new, part.stat().st_mode & 0o777)
                if not replace:
                    check_free(target, name)
                if inside:
                    _put_inside(part, target)
                else:
                    _put(part, target)
    except GainlensError:
        raise
    except Exception as error:
        if (ours := cant_write(what, error)) is not None:
            raise ours from error
        raise


def check_sums(folder: str | Path) -> None:
    """Compare a folder's files with its ``SHA256SUMS``, if there is one.

    Raises:
        FileFormatError: a file is missing or was changed after writing.
    """
    sums = Path(folder) / SUMS
    if not sums.exists():
        return
    for line in read_text(sums).splitlines():
        digest, _, name = line.partition("  ")
        file = Path(folder) / name
        if not name or not file.is_file():
            raise FileFormatError(f"{folder} is damaged: {name!r}, listed in {SUMS}, is missing")
        if _digest(file) != digest:
            raise FileFormatError(
                f"{file} does not match its checksum in {SUMS}: it is damaged; if it was changed "
                f"on purpose, remove {SUMS}"
            )


def _tidy(folder: Path, mode: int) -> None:
    """Set modes by the umask (safetensors makes owner-only files), and write the checksums."""
    files = []
    for entry in sorted(folder.rglob("*")):
        entry.chmod(mode if entry.is_dir() else mode & 0o666)
        if entry.is_file():
            files.append(entry)
    lines = [f"{_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    sums = folder / SUMS
    sums.write_text("".join(lines), encoding="utf-8")
    sums.chmod(mode & 0o666)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _must_stay(target: Path) -> bool:
    """Whether an existing folder can't be replaced by a new one of the same name."""
    if not os.access(target.parent, os.W_OK) or os.path.ismount(target):
        return True
    here = target.stat()
    mine = getattr(os, "geteuid", lambda: here.st_uid)()
    return here.st_uid != mine or os.path.samestat(here, os.stat("."))


def _put(part: Path, target: Path) -> None:
    new = part / NEW
    if target.exists():
        new.chmod(target.stat().st_mode & 0o7777)
        if any(target.iterdir()):
            if _exchange(new, target):
                return
            os.rename(target, part / OLD)
        elif os.name == "nt":
            target.rmdir()
    os.rename(new, target)


def _put_inside(part: Path, target: Path) -> None:
    new, whole, old = part / NEW, part / WHOLE, part / OLD
    old.mkdir()
    try:
        move_entries(target, old, but=part)
        os.rename(new, whole)  # from here on, the next run completes the move if this one dies
        move_entries(whole, target, LAST)
    except BaseException:
        if whole.exists():
            os.rename(whole, new)
        move_entries(old, target)
        raise


def _exchange(new: Path, old: Path) -> bool:
    """Exchange two folders atomically; False if the system does not support it."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # the C library has no such function
        return False
    if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(old))
