"""Sensitivity of the loss to a gate on the unit."""

from gainlens.probes.scores.base import Score, of_the_sum

FISHER = Score(
    name="fisher",
    statistics=("fisher",),
    gauge_invariant=True,
    compute=lambda m: m["fisher_sq"].sqrt(),
    formula="sqrt(E[(dL/dg)²]), g a gate of 1 on the unit, L a document's mean loss",
    compute_pair=of_the_sum("fisher"),
)
