"""Attention-weighted spread, over keys, of the unit's contribution to the attention logit."""

from gainlens.probes.scores.base import Score, of_the_sum

LOGIT_STD = Score(
    name="logit_std",
    statistics=("logit_spread",),
    gauge_invariant=True,
    compute=lambda m: m["logit_sq"].clamp_min(0).sqrt(),
    formula="sqrt(E[Var_a(s)]), s = q·k/sqrt(d_head) of the unit, Var over keys by attention",
    compute_pair=of_the_sum("logit"),
)
