"""Tests of every similarity measure between layers against its nulls."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from gainlens.analysis.map.frequency_profile import FrequencyProfile, log_gains
from gainlens.analysis.map.nulls import (
    Orders,
    PairTest,
    in_chunks,
    pair_test,
    shuffle,
    shuffled_orders,
)
from gainlens.analysis.map.similarity import shuffle_moments, unit_length


def all_tests(
    profiles: Float[np.ndarray, "layer unit"],
    rows: dict[str, np.ndarray],
    residuals: Float[np.ndarray, "layer unit"],
    head_residuals: Float[np.ndarray, "layer kv_head unit"],
    profile: FrequencyProfile,
    orders: tuple[Orders, Orders],
    alive: Int[np.ndarray, " living"],
    seed: int,
) -> dict[str, dict[str, PairTest]]:
    """Test every measure against its nulls, with ``orders`` for layers and for heads."""
    free = shuffled_orders(len(orders[0]), np.zeros_like(profile.groups), seed + 1)
    tests = {
        "plain": {
            name: pair_test(
                values,
                (shuffle(values, chunk) for chunk in in_chunks(free)),
                alive,
                shuffle_moments(values),
            )
            for name, values in rows.items()
        }
    }
    if profile.rotates:
        curve = log_gains(profiles) - residuals
        kept = (
            unit_length(np.exp(curve + moved[:, :, 0]))
            for moved in profile.shuffled(residuals[:, None], orders[0])
        )
        tests["frequency"] = {"cosine": pair_test(rows["cosine"], kept, alive)}
    decides = tests["frequency" if profile.rotates else "plain"]
    layers = (unit_length(m[:, :, 0]) for m in profile.shuffled(residuals[:, None], orders[0]))
    heads = (mean_of_heads(m) for m in profile.shuffled(head_residuals, orders[1]))
    decides["layer"] = pair_test(unit_length(residuals), layers, alive)
    decides["head"] = pair_test(mean_of_heads(head_residuals), heads, alive)
    return tests


def mean_of_heads(
    residuals: Float[np.ndarray, "*some kv_head unit"],
) -> Float[np.ndarray, "*some unit"]:
    """Rows whose inner products are the mean correlations between the heads of two layers."""
    living = np.maximum(residuals.any(-1).sum(-1, keepdims=True), 1)
    mean: np.ndarray = unit_length(residuals).sum(-2) / living
    return mean
