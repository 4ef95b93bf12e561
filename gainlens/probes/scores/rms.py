"""Root mean square of the key."""

from gainlens.probes.scores.base import Score

RMS = Score(
    name="rms",
    statistics=("keys",),
    gauge_invariant=False,
    compute=lambda m: m["k_sq"].sqrt(),
    formula="sqrt(E[k²])",
)
