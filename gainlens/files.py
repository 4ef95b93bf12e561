"""Write beside, then rename: a file is either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import FileFormatError, InputError

FORMAT = "gainlens-1"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it there unless an exception is raised.

    Raises:
        InputError: the folder can't be made or written.
    """
    target = Path(path)
    check_writable(target.parent)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, target)
    except OSError as error:
        raise InputError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> Path:
    """Make ``folder`` if need be and return it.

    Raises:
        InputError: it can't be made or written, or is a file.
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


def check_free(folder: str | Path, name: str = "folder", but: Path | None = None) -> Path:
    """The folder's path.

    Args:
        folder: to be made, or empty.
        name: of the argument, for the message.
        but: an entry that may be in it.

    Raises:
        InputError: it is a file, or holds something.
    """
    target = Path(folder)
    if target.is_dir() and all(entry == but for entry in target.iterdir()):
        return target
    if target.exists() or target.is_symlink():
        what = "already holds something" if target.is_dir() else "is a file"
        raise InputError(f"{name} {str(target)!r} {what}: expected a new or an empty folder")
    return target


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON whole, keys in the order given, one trailing newline; NaN is an error."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        FileFormatError: missing, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} can't be read as JSON: {error}") from None


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON header of ``facts`` as one safetensors file."""
    from safetensors.torch import save_file

    header = {"format": FORMAT, "kind": kind, "facts": json.dumps(facts, allow_nan=False)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as beside:
        save_file(whole, str(beside), metadata=header)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote under the same ``kind``.

    Raises:
        FileFormatError: missing, truncated, of another kind or version.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("kind") != kind:
                raise FileFormatError(
                    f"{path} is not a gainlens file of kind {kind!r} (format {FORMAT}): it says "
                    f"{header.get('kind')!r}, {header.get('format')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(header["facts"])
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(
            f"{path} can't be read as a gainlens {kind} file: {' '.join(str(error).split())}"
        ) from None


def file_kind(path: str | Path) -> str:
    """What a file of ``save_tensors`` says that it holds.

    Raises:
        FileFormatError: missing, truncated, or not a gainlens file.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("kind", ""))
    except Exception as error:
        raise FileFormatError(
            f"{path} can't be read as a gainlens file: {' '.join(str(error).split())}"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
