"""Zero: the unit no longer contributes to any attention logit."""

from __future__ import annotations

import torch

from gainlens.ablation.modes.base import Context, Mode, Replacement


def _zero(context: Context) -> Replacement:
    return lambda keys, layer: torch.zeros((), dtype=keys.dtype, device=keys.device)


ZERO = Mode("zero", _zero, commutes=True, meaning="cut dimensions are zero")
