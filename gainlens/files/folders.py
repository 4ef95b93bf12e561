"""A folder that appears whole or not at all, also where an empty or an old one is."""

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
"""What a reader asks for first arrives last, where a folder can't appear in one step."""
_AT_FDCWD, _EXCHANGE = -100, 2


@contextmanager
def written_folder(
    folder: str | Path, name: str = "folder", *, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder to be filled; unless an exception is raised, it becomes ``folder``.

    It appears in one step, with the checksums of its files in ``SHA256SUMS``; modes follow the
    umask. An old folder is exchanged for it in one step on Linux. Elsewhere there is an instant
    with neither; a run that dies in it leaves the old one to be put back by the next. A folder
    that must stay itself (a mounted disk, the current directory, another user's, or one whose
    parent can't be written) is filled entry by entry, what readers ask for first at the end; a
    run that dies in between is finished by the next.

    Args:
        folder: new or empty; with ``replace`` it may hold what is to be replaced.
        name: of the argument, for messages.
        replace: whether an old folder goes.

    Raises:
        InputError: it holds something, another process is writing it, it can't be written, the
            disk is full. Nothing is left then.
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
    """Compare a folder's files with its ``SHA256SUMS``; without one nothing is checked.

    Raises:
        FileFormatError: a file is missing or is not what was written.
    """
    sums = Path(folder) / SUMS
    if not sums.exists():
        return
    for line in read_text(sums).splitlines():
        digest, _, name = line.partition("  ")
        file = Path(folder) / name
        if not name or not file.is_file():
            raise FileFormatError(f"{folder} is damaged: {name!r}, named in {SUMS}, is missing")
        if _digest(file) != digest:
            raise FileFormatError(
                f"{file} is not what was written ({SUMS}): it is damaged; if it was changed on "
                f"purpose, remove {SUMS}"
            )


def _tidy(folder: Path, mode: int) -> None:
    """Modes by the umask (safetensors makes files for their owner alone), and checksums."""
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
    """Whether an existing folder can't be replaced by another of its name."""
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
        os.rename(new, whole)  # from here on the next run finishes what a dead one began
        move_entries(whole, target, LAST)
    except BaseException:
        if whole.exists():
            os.rename(whole, new)
        move_entries(old, target)
        raise


def _exchange(new: Path, old: Path) -> bool:
    """Exchange two folders in one step; False where the system can't."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(old))
