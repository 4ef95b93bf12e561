"""What a gain definition has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

Moments = Mapping[str, Float[torch.Tensor, "layer kv_head d_head"]]
"""Means over tokens by name (``k_mean``, ``k_sq``, ``q_sq``, …), float64, of one stage and unit.

Squared quantities are already averaged over the two dimensions of a pair when the unit is a pair,
so a score is one formula for both units. ``k_var`` is the variance over tokens.
"""


@dataclass(frozen=True)
class Score:
    """One gain definition.

    Attributes:
        name: how callers ask for it.
        statistics: names of the rows of ``STATISTICS`` that it needs.
        gauge_invariant: whether rescaling a key pair by s and its query pair by 1/s leaves it
            unchanged; only such a score should decide a cut.
        compute: from the means of one stage to ``[layer, kv_head, d_head]``.
        formula: the definition in one line, with its source where it has one.
    """

    name: str
    statistics: tuple[str, ...]
    gauge_invariant: bool
    compute: Callable[[Moments], Float[torch.Tensor, "layer kv_head d_head"]]
    formula: str
