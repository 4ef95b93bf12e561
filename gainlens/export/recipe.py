"""A refit of the dimensions that a plan keeps."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from gainlens.ablation.least_squares_refit import refit
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export.plan import SlicePlan
from gainlens.export.plan_files import without_cut_file


def refitted(
    model: Any, tokens: Any, plan: SlicePlan, *, rounds: int = 6, progress: bool = True
) -> SlicePlan:
    """The plan with maps from ``gainlens.ablation.refit``, or unchanged with a warning.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: calibration text.
        plan: the plan to refit.
        rounds: rounds of the refit; 0 leaves the plan unchanged.
        progress: show a progress bar.

    Raises:
        InputError: a plan with slots.
    """
    if rounds < 1:
        return plan
    if plan.frequencies is not None:
        raise InputError(
            "plan has slot frequencies, and a refit keeps the model's own: pass the cut that "
            "gainlens.best_cut returns, which is fitted already"
        )
    try:
        maps = refit(model, tokens, plan.mask, rounds=rounds, progress=progress).maps
    except UnsupportedModelError as error:
        warnings.warn(f"cut without a refit: {error}", stacklevel=2)
        return plan
    return replace(plan, maps=maps, facts=without_cut_file(plan.facts))
