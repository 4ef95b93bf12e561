"""Mean: the unit is set to its calibration mean, so only its variation with position is lost."""

from __future__ import annotations

from gainlens.ablation.modes.base import Context, Mode, Replacement
from gainlens.errors import InputError


def _mean(context: Context) -> Replacement:
    if context.gains is None:
        raise InputError("mode='mean' needs gains=… for the calibration means: got None")
    means = context.gains.mean(context.stage)
    return lambda keys, layer: means[layer].to(keys)


MEAN = Mode("mean", _mean, commutes=False, meaning="cut dimensions carry their calibration mean")
