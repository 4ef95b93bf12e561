"""What an ablation mode has to say: what a cut dimension carries instead."""

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
"""From the keys of one layer and its number to what broadcasts in their place."""


@dataclass(frozen=True)
class Context:
    """What a mode may draw on.

    Attributes:
        sites: of the model.
        stage: at which the cut acts.
        gains: calibration gains, if the caller gave any.
        cache: keys of another run, if the caller gave any.
        seed: of what is drawn at random.
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
        name: how callers ask for it.
        replacement: makes the replacement for one ablation; raises ``InputError`` when the
            context lacks what the mode needs.
        commutes: whether cutting whole pairs this way commutes with the rotation.
        meaning: one line for reports.
        takes_donors: whether what it puts in comes from other documents of the text.
    """

    name: str
    replacement: Callable[[Context], Replacement]
    commutes: bool
    meaning: str
    takes_donors: bool = False
