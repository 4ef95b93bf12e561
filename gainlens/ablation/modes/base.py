"""The definition of an ablation mode: the replacement values of cut dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from gainlens.model.sites import KeySites, Stage

if TYPE_CHECKING:
    from gainlens.ablation.key_cache import KeyCache
    from gainlens.probes.gains import KeyGains

Replacement = Callable[[Float[torch.Tensor, "batch pos kv_head d_head"], int], torch.Tensor]
"""Maps the keys of a layer and its index to replacement values that broadcast over the keys."""


@dataclass(frozen=True)
class Context:
    """Inputs available to a mode.

    Attributes:
        sites: key sites of the model.
        stage: where the cut is applied.
        gains: calibration gains, if the caller gave any.
        cache: keys of another run, if the caller gave any.
        seed: seed of random draws.
    """

    sites: KeySites
    stage: Stage
    gains: KeyGains | None = None
    cache: KeyCache | None = None
    seed: int = 0


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Attributes:
        name: the name that callers use.
        replacement: makes the replacement for one ablation; raises ``InputError`` if the
            context lacks an input that the mode needs.
        commutes: whether cutting whole pairs this way commutes with the rotation.
        meaning: one line for reports.
        takes_donors: whether the replacement values come from other documents of the text.
    """

    name: str
    replacement: Callable[[Context], Replacement]
    commutes: bool
    meaning: str
    takes_donors: bool = False
