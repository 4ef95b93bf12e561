"""The user's cache folder, and how a folder appears in it whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gainlens.errors import InputError

LEFTOVER_SECONDS = 3600.0


def cache_root() -> Path:
    """``$GAINLENS_CACHE``, else ``$XDG_CACHE_HOME/gainlens``, else ``~/.cache/gainlens``."""
    own = os.environ.get("GAINLENS_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gainlens"


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache folder ``name``, made by ``fill`` the first time.

    ``fill`` writes into a folder beside the final one, which is then renamed: another process
    sees either nothing or the finished folder, and of two that build it at once the later one
    throws its copy away.

    Raises:
        InputError: the cache folder can't be written.
    """
    root = cache_root()
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root, name)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        fill(beside)
        # mkdtemp and safetensors make things that only their owner can read; a cache is shared.
        beside.chmod(0o755)
        for file in beside.iterdir():
            file.chmod(0o644)
        try:
            beside.rename(final)
        except OSError:
            if not final.is_dir():  # not the race that another process won
                raise
    except OSError as error:
        raise _unwritable(root, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _remove_leftovers(root: Path, name: str) -> None:
    """A process that was killed while it filled the cache leaves its half beside it."""
    for leftover in root.glob(f".{name}.*"):
        try:
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError:  # gone since the listing
            continue


def _unwritable(root: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error).splitlines()[0]
    return InputError(
        f"cache folder {str(root)!r} can't be written ({reason}); "
        "set GAINLENS_CACHE to a folder that can"
    )
