"""Damage by place: the rise of the loss when only one layer or one key head is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.sweep.judging_text import check_judge
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.errors import InputError

PLACES = ("head", "layer")


def damage_by_head(
    model: Any,
    tokens: Tokens,
    cut: Cut,
    *,
    by: str = "head",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> Float[np.ndarray, "layer part"]:
    """Mean rise of the loss, in nats per token, when the cut is applied in one place at a time.

    The layers before the cut layer are run once, not once per place.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text.
        cut: a cut of any kind, applied in one place; the rest stays intact.
        by: ``head`` gives ``[layer, kv_head]``, ``layer`` gives ``[layer, 1]``.
        tokens_per_batch: upper bound on tokens per forward pass.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar.

    Raises:
        InputError: an unknown ``by``, a cut that does not fit the model, or text that chose it.
    """
    if by not in PLACES:
        raise InputError(f"by={by!r} is not one of {', '.join(PLACES)}")
    evaluator = evaluator_of(model, evaluator)
    cut.check(evaluator.sites)
    text = evaluator.on(tokens, tokens_per_batch)
    check_judge(text.documents, None, [cut], getattr(evaluator.model, "tokenizer", None))
    layers, heads, _ = cut.shape
    parts = heads if by == "head" else 1
    total = np.zeros((layers, parts))
    intact = iter(np.split(text.intact, np.cumsum(text.sizes)[:-1]))
    with tqdm(
        total=layers * parts * len(text.documents),
        desc="damage",
        unit="run",
        disable=not progress,
    ) as bar:
        for batch, baseline in zip(text.documents, intact, strict=True):
            residuals = evaluator.residuals(batch)
            for layer, part in np.ndindex(layers, parts):
                one = cut.only(layer, part if by == "head" else None)
                found = evaluator.tokens_from(layer, batch, one, residuals)
                total[layer, part] += float((found.double().mean(1).numpy() - baseline).sum())
                bar.update()
    return total / sum(text.sizes)
