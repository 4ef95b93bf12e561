"""``best_cut``: the best cut known that needs no training."""

from __future__ import annotations

import warnings
from typing import Any

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import KeyMask, Scope, check_fraction
from gainlens.ablation.least_squares_refit import refit
from gainlens.data.batches import Tokens
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.tokens import model_documents
from gainlens.probes.gains import KeyGains
from gainlens.probes.probe import probe_gains

RANKING_DOCUMENTS = 8
"""Documents that rank the units by ``fisher``, which takes a backward pass; all are refitted."""


def best_cut(
    model: Any,
    tokens: Tokens,
    fraction: float = 0.5,
    scope: Scope = "layer",
    *,
    score: str = "fisher",
    gains: KeyGains | None = None,
    rounds: int = 2,
    progress: bool = True,
) -> Cut:
    """Rank the rotary pairs, cut the quietest, and refit what stays by least squares.

    Args:
        model: a TransformerBridge or HookedTransformer; left as it was.
        tokens: calibration text; some 6,000 tokens refit well.
        fraction: share of key dimensions to cut, above 0 and below 1.
        scope: over which dimensions the fraction is taken; see ``KeyMask.quietest``.
        score: which gain ranks the pairs.
        gains: if gathered already, with ``score`` among them.
        rounds: of the refit; 0 leaves the plain cut.
        progress: show progress bars.

    Returns:
        Cut: for ``ablate``, ``surgery``, ``slim`` and training. On a model whose attention the
        refit does not describe it is the plain mask, with a warning that says why.

    Raises:
        InputError: a fraction out of range, an unknown score or scope, gains of another model.

    Example:
        >>> cut = gl.best_cut(model, calibration, fraction=0.5)
        >>> slim = gl.slim(model, cut)
    """
    check_fraction(fraction)
    if not 0 < fraction < 1:
        raise InputError(f"fraction={fraction!r}: expected above 0 and below 1")
    documents = model_documents(model, tokens)
    if gains is None:
        some = documents[:RANKING_DOCUMENTS] if score == "fisher" else documents
        gains = probe_gains(model, some, scores=(score,), progress=progress)
    mask = KeyMask.quietest(gains, fraction, score, scope)
    if rounds < 1:
        return mask
    try:
        return refit(model, documents, mask, rounds=rounds, progress=progress)
    except UnsupportedModelError as error:
        warnings.warn(f"cut without a refit: {error}", stacklevel=2)
        return mask
