"""The table of gain definitions: one file and one row each."""

from __future__ import annotations

from gainlens.errors import InputError
from gainlens.probes.scores.base import Score
from gainlens.probes.scores.fisher import FISHER
from gainlens.probes.scores.logit_std import LOGIT_STD
from gainlens.probes.scores.qk import QK
from gainlens.probes.scores.rms import RMS
from gainlens.probes.scores.std import STD

SCORES: dict[str, Score] = {s.name: s for s in (RMS, STD, QK, LOGIT_STD, FISHER)}


def get_score(name: str) -> Score:
    """Look up a gain definition by name.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SCORES:
        raise InputError(f"score={name!r} is not one of {', '.join(SCORES)}")
    return SCORES[name]


__all__ = ["SCORES", "Score", "get_score"]
