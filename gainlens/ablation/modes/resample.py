"""Resample: the unit gets its value from another document at the same position."""

from __future__ import annotations

import torch

from gainlens.ablation.modes.base import Context, Mode, Replacement
from gainlens.errors import InputError


def _resample(context: Context) -> Replacement:
    cache = context.cache
    if cache is None:
        raise InputError("mode='resample' needs cache=…, the keys of other documents: got None")
    n_donors = cache.n_documents
    if n_donors < 2:
        raise InputError(
            f"mode='resample' needs a cache of two documents or more: got {n_donors}, and a "
            "document cannot be its own donor"
        )
    # Never zero modulo the number of donors, so that no document is its own donor.
    shift = 1 + context.seed % (n_donors - 1)

    def replace(keys: torch.Tensor, layer: int) -> torch.Tensor:
        rows, n_pos = keys.shape[:2]
        if n_pos > cache.n_pos:
            raise InputError(
                f"cache holds {cache.n_pos} positions: the prompt has {n_pos}; expected at most "
                "that many"
            )
        donors = (torch.arange(rows) + shift) % n_donors
        return cache.keys[layer][donors.to(cache.keys[layer].device), :n_pos].to(keys)

    return replace


RESAMPLE = Mode(
    "resample",
    _resample,
    commutes=False,
    meaning="cut dimensions carry their value from another document at the same position",
    takes_donors=True,
)
