"""Fit every head, and again on what the layers before it hand on once they are cut.

The first pass fits each layer on the queries and keys of the intact model. In the cut model a layer
gets others, since the errors of the layers before it add up. A further pass records those, with the
cut of the pass before, and fits the maps that act on them to the same intact logits. No pass takes
a gradient of the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gainlens.ablation.cut import Cut
from gainlens.ablation.fitting import Fitted, Settings, fit_heads
from gainlens.ablation.least_squares import Maps
from gainlens.ablation.recorded_attention import RecordedAttention, record_attention


def fit_in_passes(
    model: Any,
    documents: list[Int[torch.Tensor, " _"]],
    record: RecordedAttention,
    keep: Bool[torch.Tensor, "layer kv_head d_head"],
    frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"] | None,
    start: Callable[[int, int], Maps],
    cut_of: Callable[[Fitted], Cut],
    settings: Settings,
    progress: bool,
    name: str,
) -> Fitted:
    """``fit_heads``, ``settings.passes`` times.

    Args:
        model, documents: whose queries and keys are in ``record``.
        record, keep, frequencies, start, settings, progress, name: as for ``fit_heads``.
        cut_of: the cut that found maps make.
    """
    found = fit_heads(record, keep, frequencies, start, settings, progress, name)
    stride = settings.spacing(record.lengths)
    for number in range(2, settings.passes + 1):
        hooks = cut_of(found).hooks(model)
        with record_attention(model, documents, stride, hooks, record.attention, progress) as given:
            # From the start again: maps that have seen all text can't be compared on half of it.
            found = fit_heads(
                record,
                keep,
                frequencies,
                start,
                settings,
                progress,
                f"{name}, pass {number}",
                given,
            )
    return found
