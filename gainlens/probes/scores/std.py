"""Standard deviation of the key over tokens, which ignores its constant part."""

from gainlens.probes.scores.base import Score

STD = Score(
    name="std",
    statistics=("keys",),
    gauge_invariant=False,
    compute=lambda m: m["k_var"].clamp_min(0).sqrt(),
    formula="sqrt(E[k²] - E[k]²)",
)
