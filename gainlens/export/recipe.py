"""Cuts that fold into the weights of a slim model: the recipe, or a plan with a refit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from gainlens.ablation.cut import Cut
from gainlens.ablation.least_squares_refit import refit
from gainlens.ablation.recipe import best_cut
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export.families import FAMILIES
from gainlens.export.plan import SlicePlan
from gainlens.export.sources import open_source
from gainlens.model.finding_sites import key_sites

BEHIND_NORM = "a norm sits between its projections and the rotation"


def folds(model: Any) -> bool:
    """Whether the maps of a cut of this model fold into its projections."""
    if FAMILIES.get(key_sites(model).architecture) is None:
        return True
    source = open_source(model)
    return source.family.before_maps(source.config) is None


def slim_cut(model: Any, tokens: Any, *args: Any, rounds: int = 2, **kwargs: Any) -> Cut:
    """``gainlens.best_cut``, without a fit and with a warning where its maps would not fold.

    Args:
        model, tokens, args, rounds, kwargs: as for ``gainlens.best_cut``.

    Raises:
        InputError: as for ``gainlens.best_cut``.
    """
    if rounds and not folds(model):
        warnings.warn(f"cut without a refit: {BEHIND_NORM}", stacklevel=2)
        rounds = 0
    return best_cut(model, tokens, *args, rounds=rounds, **kwargs)


def refitted(
    model: Any, tokens: Any, plan: SlicePlan, *, rounds: int = 2, progress: bool = True
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
        if not folds(model):
            raise UnsupportedModelError(BEHIND_NORM)
        return replace(
            plan, maps=refit(model, tokens, plan.mask, rounds=rounds, progress=progress).maps
        )
    except UnsupportedModelError as error:
        warnings.warn(f"cut without a refit: {error}", stacklevel=2)
        return plan
