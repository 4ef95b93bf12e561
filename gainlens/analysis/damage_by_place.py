"""Where it hurts: the rise of the loss when one layer, or one of its key heads, alone is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.key_mask import KeyMask
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.errors import InputError
from gainlens.model.tokens import model_batches

PLACES = ("head", "layer")


def damage_by_head(
    model: Any,
    tokens: Tokens,
    mask: KeyMask,
    *,
    by: str = "head",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> Float[np.ndarray, "layer part"]:
    """Mean rise of the loss in nats per token when ``mask`` is applied in one place at a time.

    The layers before the one that is cut are run once, not again for every place.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text.
        mask: what stays where it is applied.
        by: ``head`` gives ``[layer, kv_head]``, ``layer`` gives ``[layer, 1]``.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        InputError: another ``by``, or a mask of another model's shape.
    """
    if by not in PLACES:
        raise InputError(f"by={by!r} is not one of {', '.join(PLACES)}")
    evaluator = Evaluator(model)
    if mask.shape != evaluator.sites.shape:
        raise InputError(
            f"mask has shape {mask.shape}: this model ({evaluator.sites.architecture}) has "
            f"{evaluator.sites.shape}"
        )
    documents = list(model_batches(model, tokens, tokens_per_batch))
    layers, heads, _ = mask.shape
    parts = heads if by == "head" else 1
    total = np.zeros((layers, parts))
    n_documents = 0
    with tqdm(
        total=layers * parts * len(documents), desc="damage", unit="run", disable=not progress
    ) as bar:
        for batch in documents:
            baseline = evaluator.tokens(batch).double().mean(1)
            residuals = evaluator.residuals(batch)
            n_documents += len(baseline)
            for layer, part in np.ndindex(layers, parts):
                keep = torch.ones(mask.shape, dtype=torch.bool)
                chosen = slice(part, part + 1) if by == "head" else slice(None)
                keep[layer, chosen] = mask.keep[layer, chosen]
                cut = evaluator.tokens_from(layer, batch, KeyMask(keep), residuals)
                total[layer, part] += float((cut.double().mean(1) - baseline).sum())
                bar.update()
    return total / n_documents
