"""Where it hurts: the rise of the loss when one layer's key head alone is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.mask import KeyMask
from gainlens.analysis.evaluate import Evaluator
from gainlens.model.batches import TOKENS_PER_BATCH, Tokens, batches


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

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text.
        mask: what stays where it is applied.
        by: ``head`` gives ``[layer, kv_head]``, ``layer`` gives ``[layer, 1]``.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.
    """
    evaluator = Evaluator(model)
    documents = list(batches(tokens, int(model.cfg.d_vocab), tokens_per_batch))
    baseline = np.concatenate([evaluator.documents(b) for b in documents])
    layers, heads, _ = mask.shape
    parts = heads if by == "head" else 1
    damage = np.zeros((layers, parts))
    places = [(layer, part) for layer in range(layers) for part in range(parts)]
    for layer, part in tqdm(places, desc="damage", unit="place", disable=not progress):
        keep = torch.ones(mask.shape, dtype=torch.bool)
        chosen = slice(part, part + 1) if by == "head" else slice(None)
        keep[layer, chosen] = mask.keep[layer, chosen]
        cut = np.concatenate([evaluator.documents(b, KeyMask(keep)) for b in documents])
        damage[layer, part] = float((cut - baseline).mean())
    return damage
