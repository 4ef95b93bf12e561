"""Zero: the unit's share of every attention logit is gone."""

from __future__ import annotations

import torch

from gainlens.ablation.modes.base import Context, Mode, Replacement


def _zero(context: Context) -> Replacement:
    return lambda keys, layer: torch.zeros((), dtype=keys.dtype, device=keys.device)


ZERO = Mode("zero", _zero, commutes=True, meaning="cut dimensions are zero")
