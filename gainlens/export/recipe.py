"""The best cut known without training: which units to keep, and the refit of those that stay."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

from gainlens.ablation.key_mask import Scope
from gainlens.ablation.refit_cut import RefitCut, refit
from gainlens.errors import UnsupportedModelError
from gainlens.export.families import FAMILIES
from gainlens.export.plan import SlicePlan
from gainlens.model.finding_sites import key_sites
from gainlens.probes import KeyGains, probe_gains

FISHER_DOCUMENTS = 8
"""Documents that rank the units by ``fisher``, which takes a backward pass; all are refitted."""


def training_free_cut(
    model: Any,
    tokens: Int[torch.Tensor, "document pos"],
    keep: float = 0.5,
    *,
    gains: KeyGains | None = None,
    score: str = "fisher",
    scope: Scope = "head",
    values: int | float | Sequence[int] | None = None,
    rounds: int = 2,
    progress: bool = True,
) -> tuple[SlicePlan, RefitCut | None]:
    """Rank by ``score``, keep the best, and refit what stays by least squares.

    Scope ``head`` is the widest that really saves what it says: heads of unequal size are padded
    to the widest of their layer.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: calibration text, documents of one length; some 6,000 tokens refit well.
        keep: share of key dimensions that stay.
        gains: if gathered already, with ``score`` among them.
        score, scope, values: as for ``SlicePlan.from_gains``.
        rounds: of ``gainlens.refit``; 0 for the plain cut.
        progress: show progress bars.

    Returns:
        The plan, and the refit of its mask, both for ``slim``; None where there is none: with
        ``rounds=0``, or on a model whose attention the refit does not describe (then with a
        warning that says why).
    """
    if gains is None:
        some = tokens[:FISHER_DOCUMENTS] if score == "fisher" else tokens
        gains = probe_gains(model, some, scores=(score,), progress=progress)
    plan = SlicePlan.from_gains(gains, keep, score, scope, values=values)
    if rounds < 1:
        return plan, None
    return plan, refit_of(model, tokens, plan, rounds=rounds, progress=progress)


def refit_of(
    model: Any, tokens: Any, plan: SlicePlan, *, rounds: int = 2, progress: bool = True
) -> RefitCut | None:
    """``gainlens.refit`` of a plan's mask, or None with a warning where it can't be had."""
    family = FAMILIES.get(key_sites(model).architecture)
    try:
        if family is not None and family.norm:
            raise UnsupportedModelError("a norm sits between its projections and the rotation")
        return refit(model, tokens, plan.mask, rounds=rounds, progress=progress)
    except UnsupportedModelError as error:
        warnings.warn(f"cut without a refit: {error}", stacklevel=2)
        return None
