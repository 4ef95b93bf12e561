"""The table of ablation modes: one file and one row each."""

from __future__ import annotations

from gainlens.ablation.modes.base import Context, Mode, Replacement
from gainlens.ablation.modes.mean import MEAN
from gainlens.ablation.modes.patch import PATCH
from gainlens.ablation.modes.resample import RESAMPLE
from gainlens.ablation.modes.zero import ZERO
from gainlens.errors import InputError

MODES: dict[str, Mode] = {m.name: m for m in (ZERO, MEAN, RESAMPLE, PATCH)}


def get_mode(name: str) -> Mode:
    """Look up an ablation mode by name.

    Raises:
        InputError: the name is unknown.
    """
    if name not in MODES:
        raise InputError(f"mode={name!r} is not one of {', '.join(MODES)}")
    return MODES[name]


__all__ = ["MODES", "Context", "Mode", "Replacement", "get_mode"]
