"""Cosines between layers and the null that they have to beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def cosine_matrix(x: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, "row row2"]:
    """Cosine of every pair of rows; 0 where a row is all zero."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    product: Float[np.ndarray, "row row2"] = unit @ unit.T
    return product


def variation(x: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, " row"]:
    """Coefficient of variation of each row: standard deviation over mean."""
    mean = x.mean(1)
    spread: Float[np.ndarray, " row"] = np.divide(
        x.std(1), mean, out=np.zeros_like(mean), where=mean > 0
    )
    return spread


def permutation_null(
    x: Float[np.ndarray, "layer unit"], n_permutations: int, seed: int
) -> Float[np.ndarray, "permutation layer layer2"]:
    """Cosines after shuffling the units of every layer independently: nothing is shared."""
    rng = np.random.default_rng(seed)
    null = np.empty((n_permutations, len(x), len(x)))
    for i in range(n_permutations):
        null[i] = cosine_matrix(rng.permuted(x, axis=1))
    return null
