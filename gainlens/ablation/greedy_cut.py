"""Cut in rounds and score again after each, because the kept dimensions compensate for cut ones."""

from __future__ import annotations

from typing import Any

import torch

from gainlens.ablation.hooks import ablation_hooks
from gainlens.ablation.key_mask import (
    KeyMask,
    Scope,
    check_fraction,
    check_something_stays,
    keep_by_order,
    share,
)
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.errors import InputError
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import attached
from gainlens.model.tokens import model_documents
from gainlens.probes.probe import probe_gains


def greedy_mask(
    model: Any,
    tokens: Tokens,
    fraction: float,
    *,
    score: str = "fisher",
    scope: Scope = "layer",
    unit: str = "pair",
    rounds: int = 8,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> KeyMask:
    """Cut the quietest ``fraction`` in equal rounds, scoring the model as cut so far in each.

    Args:
        model: a TransformerBridge or HookedTransformer; left as it was.
        tokens: calibration text; it is run once per round.
        fraction: total share of dimensions to cut, above 0 and below 1.
        score: which gain ranks the units; see ``gainlens.probes.scores.SCORES``.
        scope, unit: as for ``KeyMask.quietest``. With ``layer`` and ``model``, heads
            may lose different shares.
        rounds: number of rounds.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar per round.

    Returns:
        KeyMask: its facts include the text, so ``surgery`` refuses to evaluate on the same text.

    Raises:
        InputError: a fraction that cuts nothing or everything, fewer than one round, an unknown
            score, scope or unit.
    """
    check_fraction(fraction)
    if not 0 < fraction < 1:
        raise InputError(f"fraction={fraction!r}: expected above 0 and below 1")
    if rounds < 1:
        raise InputError(f"rounds={rounds!r}: expected at least 1")
    documents = model_documents(model, tokens)
    partner = key_sites(model).partner
    mask = KeyMask(torch.ones(key_sites(model).shape, dtype=torch.bool))
    texts: set[str] = set()
    for number in range(1, rounds + 1):
        # Not ``ablate``: a probe inside it warns, but here we do want to score the cut model.
        with attached(model, ablation_hooks(model, mask)):
            gains = probe_gains(
                model, documents, (score,), tokens_per_batch=tokens_per_batch, progress=progress
            )
        texts |= set(gains.texts)
        values = gains.score(score, unit=unit).double()
        shared = scope == "universal"
        if shared:  # shares of the remaining sum; cut units are then ranked below all others
            values = share(values.masked_fill(~mask.keep, 0.0))
        values = torch.where(mask.keep, values, values.min() - 1.0)
        target = fraction * number / rounds
        keep = keep_by_order(values, target, scope, unit, partner, shared=shared)
        mask = KeyMask(keep & mask.keep)
        check_something_stays(mask, fraction)
    return KeyMask(
        mask.keep,
        {"order": "greedy", "score": score, "scope": scope, "unit": unit, "fraction": fraction,
         "rounds": rounds, "texts": sorted(texts), "documents": list(gains.documents),
         "fingerprint": gains.model.fingerprint},
    )  # fmt: skip
