"""``best_cut``: the best cut known that needs no training."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Int

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import KeyMask, Scope, check_fraction
from gainlens.ablation.least_squares_refit import refit
from gainlens.ablation.slot_fit import check_rotation, fit_slots
from gainlens.data.batches import Tokens
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.finding_sites import key_sites
from gainlens.model.tokens import model_documents
from gainlens.probes.gains import KeyGains
from gainlens.probes.probe import probe_gains

RANKING_DOCUMENTS, RANKING_LENGTH = 12, 512
"""Documents that rank the units by ``fisher``, which takes a backward pass (whose memory grows with
the square of the length), and their length in tokens. They are spread over the text, so that every
domain is among them; all of the text is fitted."""


def best_cut(
    model: Any,
    tokens: Tokens,
    fraction: float = 0.5,
    scope: Scope = "layer",
    *,
    score: str = "fisher",
    gains: KeyGains | None = None,
    rounds: int = 6,
    progress: bool = True,
) -> Cut:
    """Rank the rotary pairs, cut the quietest, and refit what stays by least squares.

    With ``scope="universal"``, where one set has to serve all heads, the pairs move into shared
    rotary slots instead (``gainlens.ablation.fit_slots``), which costs far less.

    Args:
        model: a TransformerBridge or HookedTransformer; left as it was.
        tokens: calibration text, as long and of the domains that the cut is for; 64 tokens per
            dimension of a head or more.
        fraction: share of key dimensions to cut, above 0 and below 1.
        scope: over which dimensions the fraction is taken; see ``KeyMask.quietest``.
        score: which gain ranks the pairs.
        gains: if gathered already, with ``score`` among them.
        rounds: of the fit, at most; 0 leaves the plain cut.
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
        gains = ranking_gains(model, documents, score, progress=progress)
    mask = KeyMask.quietest(gains, fraction, score, scope)
    if rounds < 1:
        return mask
    try:
        if scope == "universal" and rotates_whole(model):
            return fit_slots(
                model,
                documents,
                gains,
                fraction,
                scope,
                score=score,
                rounds=rounds,
                progress=progress,
            )
        return refit(model, documents, mask, rounds=rounds, progress=progress)
    except UnsupportedModelError as error:
        warnings.warn(f"cut without a refit: {error}", stacklevel=2)
        return mask


def ranking_gains(
    model: Any, tokens: Tokens, score: str = "fisher", *, progress: bool = True
) -> KeyGains:
    """The gains by which ``best_cut`` ranks.

    Args:
        model, tokens, score, progress: as for ``best_cut``.

    Raises:
        InputError: as for ``gainlens.probe_gains``.
    """
    documents = model_documents(model, tokens)
    some = ranking(documents) if score == "fisher" else documents
    return probe_gains(
        model, some, scores=(score,), tokens_per_batch=RANKING_LENGTH, progress=progress
    )


def ranking(documents: list[Int[torch.Tensor, " _"]]) -> list[Int[torch.Tensor, " _"]]:
    """Beginnings of a few documents, spread evenly over the text."""
    step = max(1, -(-len(documents) // RANKING_DOCUMENTS))
    return [document[:RANKING_LENGTH] for document in documents[::step]]


def rotates_whole(model: Any) -> bool:
    """Whether all dimensions of a head rotate, so that slots can take any of them."""
    try:
        check_rotation(key_sites(model))
    except UnsupportedModelError:
        return False
    return True
