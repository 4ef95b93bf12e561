"""Gains of generated models whose shared units are known."""

from __future__ import annotations

import numpy as np


def planted(
    seed: int,
    shared: int,
    private: int,
    *,
    ratio: float = 2.0,
    noise: float = 0.1,
    shape: tuple[int, int, int] = (12, 4, 32),
    per: str = "layer",
) -> tuple[np.ndarray, np.ndarray]:
    """Gains ``[layer, head, unit]`` and the boolean set of shared units.

    ``shared`` units are ``ratio`` times as loud as the quiet ones in every layer; ``private`` ones
    besides are so in one layer (``per="layer"``: in all of its heads) or one head. All gains carry
    log-normal noise, and each head a scale of its own, which no comparison may depend on.
    """
    rng = np.random.default_rng(seed)
    layers, heads, units = shape
    loud = np.zeros(shape, dtype=bool)
    common = rng.permutation(units)[:shared]
    rest = np.setdiff1d(np.arange(units), common)
    for layer in range(layers):
        of_layer = rng.permutation(rest)[:private]
        for head in range(heads):
            chosen = of_layer if per == "layer" else rng.permutation(rest)[:private]
            loud[layer, head, chosen] = True
    loud[..., common] = True
    gains = np.where(loud, ratio, 1.0) * np.exp(noise * rng.standard_normal(shape))
    gains *= np.exp(rng.standard_normal((layers, heads, 1)))
    truth = np.zeros(units, dtype=bool)
    truth[common] = True
    return gains, truth


def flat(seed: int, cv: float = 0.1, shape: tuple[int, int, int] = (12, 4, 32)) -> np.ndarray:
    """Independent gains so even that their cosines are above 0.98."""
    return np.exp(cv * np.random.default_rng(seed).standard_normal(shape))


def f1(found: tuple[int, ...], truth: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 1 where both sets are empty."""
    wanted = {int(u) for u in np.flatnonzero(truth)}
    total = len(wanted) + len(found)
    return 1.0 if total == 0 else 2 * len(wanted & set(found)) / total
