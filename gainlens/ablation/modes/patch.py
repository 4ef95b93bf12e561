"""Patch: the value from a cached run on another (clean or corrupted) prompt."""

from __future__ import annotations

import torch

from gainlens.ablation.modes.base import Context, Mode, Replacement
from gainlens.errors import InputError


def _patch(context: Context) -> Replacement:
    cache = context.cache
    if cache is None:
        raise InputError("mode='patch' needs cache=…, the keys of another run: got None")

    def replace(keys: torch.Tensor, layer: int) -> torch.Tensor:
        if keys.shape[1] != cache.n_pos or cache.n_documents not in (1, keys.shape[0]):
            raise InputError(
                f"cache holds [document, position] = {[cache.n_documents, cache.n_pos]}: the "
                f"prompt has {list(keys.shape[:2])}, expected the same length and as many "
                "documents (or one)"
            )
        return cache.keys[layer].to(keys)

    return replace


PATCH = Mode(
    "patch", _patch, commutes=False, meaning="cut dimensions carry their value from a cached run"
)
