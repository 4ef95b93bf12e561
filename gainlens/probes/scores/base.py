"""The interface of a gain definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

Moments = Mapping[str, Float[torch.Tensor, "layer kv_head d_head"]]
"""Means over tokens by name (``k_mean``, ``k_sq``, ``q_sq``, …), float64, for one stage and unit.

If the unit is a pair, squared quantities are already averaged over its two dimensions, so one
formula serves both units. ``k_var`` is the variance over tokens.
"""


@dataclass(frozen=True)
class Score:
    """One gain definition.

    Attributes:
        name: the name that callers use.
        statistics: names of the rows of ``STATISTICS`` that it needs.
        gauge_invariant: whether the score is unchanged when a key pair is scaled by s and its
            query pair by 1/s; only such a score should decide a cut.
        compute: a function from the means of one stage to ``[layer, kv_head, d_head]``.
        compute_pair: computes the score of rotary pairs from the moments of single dimensions and
            each dimension's partner, for scores where averaging the moments is not enough.
        formula: the definition in one line, with its source if there is one.
    """

    name: str
    statistics: tuple[str, ...]
    gauge_invariant: bool
    compute: Callable[[Moments], Float[torch.Tensor, "layer kv_head d_head"]]
    formula: str
    compute_pair: PairScore | None = None


PairScore = Callable[
    [Moments, Int[torch.Tensor, " d_head"]], Float[torch.Tensor, "layer kv_head d_head"]
]


def of_the_sum(moment: str) -> PairScore:
    """sqrt(E[(a + b)²]) of a pair: ``moment_sq`` holds E[a²] and E[b²], ``moment_cross`` E[ab]."""

    def pair(
        m: Moments, partner: Int[torch.Tensor, " d_head"]
    ) -> Float[torch.Tensor, "layer kv_head d_head"]:
        square, cross = m[f"{moment}_sq"], m[f"{moment}_cross"]
        alone = partner == torch.arange(len(partner))
        both = square + torch.where(alone, 0.0, square[..., partner] + 2 * cross)
        return both.clamp_min(0).sqrt()

    return pair
