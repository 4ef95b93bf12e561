"""Energy of queries times energy of keys."""

from gainlens.probes.scores.base import Score

QK = Score(
    name="qk",
    statistics=("keys", "queries"),
    gauge_invariant=True,
    compute=lambda m: (m["q_sq"] * m["k_sq"]).sqrt(),
    formula="sqrt(E[q²]·E[k²]), E[q²] over the query heads of the key head (ThinK, 2407.21018)",
)
