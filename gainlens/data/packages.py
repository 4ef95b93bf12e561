"""Texts that installed packages bring along: PyTorch's C++ headers, packages' descriptions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gainlens.errors import InputError

GENERATED = "@generated"
"""What a header says near its top that a program wrote; there are thousands, nearly alike."""
TOP = 500
"""Characters."""


def headers() -> Iterator[str]:
    """Each C++ header that PyTorch installs and people wrote, in the order of their paths.

    Raises:
        InputError: this build of PyTorch installs none.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for folder in folders for file in (Path(folder) / "include").rglob("*.h")]
    if not files:
        raise InputError(f"text 'headers': PyTorch in {folders} holds no C++ headers")
    for file in sorted(files):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not a file that the caller chose
        if GENERATED not in text[:TOP]:
            yield text


def readmes() -> Iterator[str]:
    """The description of each installed package, once, in the order of the packages' names.

    Most are the README of the package. Which there are depends on what is installed.
    """
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        about: Any = package.metadata or {}  # a broken install has none
        if "Name" in about and "Description" in about and (text := about["Description"].strip()):
            found.setdefault(about["Name"].lower(), text)
    seen = set()
    for _, text in sorted(found.items()):
        if text not in seen:
            seen.add(text)
            yield text
