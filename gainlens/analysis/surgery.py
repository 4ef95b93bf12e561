"""Surgery: cut more and more key dimensions, with controls, and measure the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.ablate import ablation_hooks
from gainlens.ablation.mask import KeyMask, Scope
from gainlens.analysis.curve import SurgeryCurve
from gainlens.analysis.points import ORDERS, sweep_points
from gainlens.errors import InputError
from gainlens.model.batches import TOKENS_PER_BATCH, Tokens, batches
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import TextHasher, token_losses
from gainlens.model.hooks import attached
from gainlens.probes.gains import KeyGains


def document_losses(
    model: Any,
    documents: Sequence[Int[torch.Tensor, "document pos"]],
    mask: KeyMask | None = None,
    mode: str = "zero",
    gains: KeyGains | None = None,
) -> Float[np.ndarray, " document"]:
    """Mean next-token loss of each document in nats per token, with ``mask`` cut if given.

    Raises:
        InputError: the loss of a document is not finite.
    """
    hooks = ablation_hooks(model, mask, mode, gains=gains) if mask is not None else None
    found = []
    with attached(model, hooks or []):
        for batch in documents:
            found.append(token_losses(model, batch).double().mean(1).numpy())
    if hooks is not None:
        hooks.check_fired()
    losses = np.concatenate(found)
    if not np.isfinite(losses).all():
        first = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise InputError(
            f"the loss of document {first} is not finite; expected weights without NaN or infinity"
        )
    return losses


def surgery(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fractions: Sequence[float] = (0.25, 0.5, 0.6, 0.8),
    *,
    score: str | Sequence[str] = "qk",
    scope: Scope | Sequence[Scope] = "head",
    unit: str = "pair",
    mode: str = "zero",
    orders: Sequence[str] = ORDERS,
    seeds: Sequence[int] = (0, 1, 2),
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> SurgeryCurve:
    """Sweep ablations over fractions, quietest first, beside random and loudest-first controls.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text, other than what the gains were gathered on.
        gains: calibration gains of this model, which choose what is cut.
        fractions: shares of key dimensions to cut, below 1.
        score, scope: one or several; every combination is a curve.
        unit: ``pair`` or ``dim``.
        mode: a row of ``gainlens.ablation.modes.MODES``.
        orders: which orders to run; see ``gainlens.analysis.points.ORDERS``.
        seeds: of the random control.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar with the time left.

    Raises:
        InputError: gains of another model, a fraction outside 0..1 or cutting everything, text
            that also chose the cut, a loss that is not finite.
    """
    points = sweep_points(
        tuple(fractions),
        tuple(orders),
        tuple(seeds),
        (score,) if isinstance(score, str) else tuple(score),
        (scope,) if isinstance(scope, str) else tuple(scope),
        unit,
        mode,
    )
    masks = [point.mask(gains) for point in points]
    fingerprint = model_fingerprint(model)
    if fingerprint != gains.model.fingerprint:
        raise InputError(
            f"gains were gathered on other weights ({gains.model.architecture}, "
            f"{gains.model.fingerprint[:12]}) than this model's ({fingerprint[:12]})"
        )
    hasher = TextHasher()
    documents = list(batches(tokens, int(model.cfg.d_vocab), tokens_per_batch))
    for batch in documents:
        hasher.update(batch)
    text = hasher.hexdigest()
    if text in gains.texts:
        raise InputError(
            "tokens are the text that the gains were gathered on: text that chose a cut can't "
            "judge it (load_tokens(..., split='validation') gives other documents)"
        )
    losses = np.empty((len(points), sum(len(batch) for batch in documents)))
    with tqdm(total=len(points) + 1, desc="surgery", unit="point", disable=not progress) as bar:
        baseline = document_losses(model, documents)
        bar.update()
        for i, (point, mask) in enumerate(zip(points, masks, strict=True)):
            losses[i] = document_losses(model, documents, mask, point.mode, gains)
            bar.update()
    n_tokens = sum(batch.numel() for batch in documents)
    return SurgeryCurve(points, losses, baseline, gains.model, text, n_tokens)
