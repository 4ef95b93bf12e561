"""How far the unit's share of the attention logit spreads over the keys that are attended to."""

from gainlens.probes.scores.base import Score, of_the_sum

LOGIT_STD = Score(
    name="logit_std",
    statistics=("logit_spread",),
    gauge_invariant=True,
    compute=lambda m: m["logit_sq"].clamp_min(0).sqrt(),
    formula="sqrt(E[Var_a(s)]), s = q·k/sqrt(d_head) of the unit, Var over keys by attention",
    compute_pair=of_the_sum("logit"),
)
