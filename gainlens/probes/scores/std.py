"""Standard deviation of the key over tokens: what is left when a constant is taken off."""

from gainlens.probes.scores.base import Score

STD = Score(
    name="std",
    statistics=("keys",),
    gauge_invariant=False,
    compute=lambda m: m["k_var"].clamp_min(0).sqrt(),
    formula="sqrt(E[k²] - E[k]²)",
)
