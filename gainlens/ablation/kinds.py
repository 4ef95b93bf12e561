"""The table of cuts that can be saved: one module and one row each."""

from __future__ import annotations

from pathlib import Path

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut
from gainlens.ablation.slot_cut import SlotCut
from gainlens.errors import FileFormatError
from gainlens.files import file_kind

CUTS: dict[str, type[Cut]] = {c.kind: c for c in (KeyMask, RefitCut, SlotCut)}


def load_cut(path: str | Path) -> Cut:
    """Read a cut of any kind; executes no code.

    Args:
        path: file written by the ``save`` of a cut.

    Raises:
        FileFormatError: the file is missing, truncated or not a cut.

    Example:
        >>> cut = gl.load_cut("cut.safetensors")
        >>> slim = gl.slim(model, cut)
    """
    kind = file_kind(path)
    if kind not in CUTS:
        raise FileFormatError(f"{path} contains a {kind!r}; expected one of {', '.join(CUTS)}")
    return CUTS[kind].load(path)
