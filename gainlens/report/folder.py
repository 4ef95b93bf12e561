"""The folder that a page is written to."""

from __future__ import annotations

from pathlib import Path

from gainlens.errors import InputError
from gainlens.files import check_writable, read_json


def check_page_folder(out: str | Path, file: str, kind: str, what: str) -> Path:
    """Check that a folder is new, empty, or an earlier page of this kind, which may be replaced.

    Args:
        out: the folder.
        file: that says what kind of page a folder holds.
        kind: the ``kind`` in that file.
        what: such a page in words, for the message.

    Raises:
        InputError: the folder is not writable or contains something else.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: expected a folder")
    check_writable(out.parent)
    if out.is_dir():
        check_writable(out)
        if any(out.iterdir()):
            known = read_json(out / file) if (out / file).is_file() else None
            if not (isinstance(known, dict) and known.get("kind") == kind):
                raise InputError(f"--out {out} contains files that are not {what}")
    return out
