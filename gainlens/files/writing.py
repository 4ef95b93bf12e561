"""Write to a temporary file, then rename it, so a file is either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import GainlensError, InputError
from gainlens.files.content import FORMAT, as_json, tensors_checksum
from gainlens.files.parts import cant_write, check_writable, part_name, part_of


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` unless an exception is raised.

    Raises:
        InputError: the folder can't be created or written, the disk is full, or ``path`` is a
            folder, a pipe or a device.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        what = "folder" if target.is_dir() else "pipe or device"
        raise InputError(f"{target} can't be written: it is a {what}, expected a file")
    check_writable(target.parent)
    try:
        with part_of(target, target.parent) as part:
            beside = part / target.name
            yield beside
            os.chmod(beside, part.stat().st_mode & 0o666)
            os.replace(beside, target)
    except GainlensError:
        raise
    except Exception as error:
        if (ours := cant_write(str(target), error)) is not None:
            raise ours from error
        raise


def check_free(folder: str | Path, name: str = "folder") -> Path:
    """The path of a new or empty folder.

    Args:
        folder: a folder to create, or an empty one; it may contain its own hidden parts.
        name: name of the argument, for the message.

    Raises:
        InputError: the path is a file or a non-empty folder.
    """
    target = Path(folder)
    part = part_name(Path(os.path.realpath(target)))
    if target.is_dir() and all(part.fullmatch(entry.name) for entry in target.iterdir()):
        return target
    if target.exists() or target.is_symlink():
        what = "already holds something" if target.is_dir() else "is a file"
        raise InputError(f"{name} {str(target)!r} {what}: expected a new or an empty folder")
    return target


def write_json(path: str | Path, value: Any) -> None:
    """Write a complete JSON file, with keys in the given order and one trailing newline.

    Raises:
        InputError: the value holds NaN or is not JSON-serialisable, or the file can't be written.
    """
    text = as_json(value, str(path), indent=1, ensure_ascii=False) + "\n"
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON header of ``facts`` as one safetensors file, with a checksum.

    Raises:
        InputError: ``facts`` holds NaN or is not JSON-serialisable, or the file can't be written.
    """
    from safetensors.torch import save_file

    text = as_json(facts, f"{path}: facts")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "kind": kind,
        "facts": text,
        "checksum": tensors_checksum(kind, whole, text),
    }
    with written_whole(path) as beside:
        save_file(whole, str(beside), metadata=header)
