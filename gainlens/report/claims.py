"""The claims of the rank-collapse report, and their verdicts for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.stats.intervals import t_interval
from gainlens.stats.verdicts import MARGIN, Verdict

FLAT_MARGIN = MARGIN
FUNCTIONAL_MARGIN = 0.1


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict, the measured number in words, and its control.

    Attributes:
        quote: the claim as stated in the rank-collapse report.
        verdict: the verdict for this model.
        number: the measured quantity with unit and interval.
        control: the same measurement in a case where the claim should not hold.
        anchor: id of the page section with the evidence.
    """

    quote: str
    verdict: Verdict
    number: str
    control: str
    anchor: str

    @property
    def where(self) -> str:
        """The texts and the context that it was judged on; empty if it names neither."""
        verdict = self.verdict
        parts = [", ".join(verdict.domain), str(verdict.context or "")]
        return ": ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "quote": self.quote,
            "where": self.where,
            "status": self.verdict.status,
            "number": self.number,
            "control": self.control,
            "verdict": self.verdict.to_json(),
        }


def surgery_claims(
    curve: SurgeryCurve, claims: Sequence[tuple[str, float, float]], **choice: Any
) -> list[Claim]:
    """Claims (quote, fraction, margin) that cutting the fraction costs less than the margin.

    They are judged on the same documents, so they are corrected together.
    """
    asked = [(curve.index_of(fraction, **choice), margin) for _, fraction, margin in claims]
    verdicts = curve.verdicts_together(asked)
    return [
        _surgery_claim(curve, quote, fraction, margin, verdict)
        for (quote, fraction, margin), verdict in zip(claims, verdicts, strict=True)
    ]


def _surgery_claim(
    curve: SurgeryCurve, quote: str, fraction: float, margin: float, verdict: Verdict
) -> Claim:
    low, high = verdict.interval
    moves = "rises" if verdict.estimate >= 0 else "changes"
    number = (
        f"loss {moves} by {verdict.estimate:.3f} nats [{low:.3f}, {high:.3f}] at "
        f"{fraction:.0%} cut (bound set beforehand: {margin:g}); "
        f"perplexity × {np.exp(verdict.estimate):.2f}"
    )
    controls = []
    random = curve.find(order="random", fraction=fraction)
    if random:
        # Seeds share the documents, so average over seeds per document before the interval.
        delta = np.mean([curve.deltas(i) for i in random], axis=0)
        low, high = t_interval(delta)
        controls.append(f"random pairs {delta.mean():+.3f} [{low:.3f}, {high:.3f}]")
    for i in curve.find(order="loudest", fraction=fraction)[:1]:
        controls.append(f"loudest pairs {curve.deltas(i).mean():+.3f}")
    return Claim(quote, verdict, number, "; ".join(controls) or "none run", "surgery")


def best_claim(curve: SurgeryCurve, label: str) -> Claim | None:
    """The best cut of half without training, beside the same cut only zeroed; None if not run."""
    found = curve.find(order="given", label=label)
    if not found:
        return None
    fraction = curve.points[found[0]].fraction
    verdict = curve.verdict_at(found[0], FLAT_MARGIN)
    zeroed = curve.find(order="given", label=label.replace("refitted", "zeroed"))
    control = "; ".join(f"zeroed without the refit {curve.deltas(i).mean():+.3f}" for i in zeroed)
    low, high = verdict.interval
    return Claim(
        "half can go without training, if the rest is refitted",
        verdict,
        f"loss rises by {verdict.estimate:.3f} nats [{low:.3f}, {high:.3f}] at {fraction:.0%} cut "
        f"(bound set beforehand: {FLAT_MARGIN:g})",
        control or "none run",
        "surgery",
    )


def cosine_claim(cmap: CoordinateMap) -> Claim:
    """The claim of one coordinate system for all layers."""
    verdict = cmap.verdict(claim="cosine")
    s = cmap.summary()
    low, high = verdict.interval
    control = f"units shuffled {s['null_cosine']:.3f}"
    if "null_cosine_frequency" in s:
        control += f", shuffled around the frequency profile {s['null_cosine_frequency']:.3f}"
    return Claim(
        "cosine above 0.99 between layers: one universal coordinate system",
        verdict,
        f"mean cosine {s['cosine']:.3f} [{low:.3f}, {high:.3f}] between layers (lowest pair "
        f"{s['min_cosine']:.3f}): {cmap.answer}",
        f"{control}; centred cosine {s['centred_cosine']:.3f}; CV of the gains {s['cv']:.2f}",
        "map",
    )


def sink_claim(cmap: CoordinateMap) -> Claim:
    """The claim that sinks are the same at every depth; undecided if they were not measured."""
    quote = "a sink dimension is a sink at every depth"
    if cmap.sinks is None:
        unknown = float("nan")
        verdict = Verdict(
            "undecided", quote, unknown, (unknown, unknown), unknown, cmap.n_documents
        )
        return Claim(quote, verdict, "sinks were not measured in this run", "none run", "sinks")
    verdict = cmap.verdict(claim="sinks")
    if len(cmap.sinks.layers) < 3:
        number = f"{len(cmap.sinks.layers)} layers have a sink head, too few to follow with depth"
        return Claim(quote, verdict, number, "none run", "sinks")
    low, high = verdict.interval
    number = (
        f"a sink unit of one layer is one in another with chance {verdict.estimate:.2f} "
        f"[{low:.2f}, {high:.2f}] (every depth: above {verdict.margin:g})"
    )
    names = {"plain": "units shuffled", "band": "shuffled within frequency bands"}
    control = "; ".join(
        f"{names.get(name, name)} {null['chance']:.2f} (p = {null['p']:.2g})"
        for name, null in cmap.sinks.nulls.items()
    )
    return Claim(quote, verdict, number, control or "none run", "sinks")


def all_claims(curve: SurgeryCurve, cmap: CoordinateMap, **choice: Any) -> list[Claim]:
    """The four claims in page order."""
    asked = [
        ("half of the key dimensions can be deleted with the loss flat", 0.5, FLAT_MARGIN),
        ("at 80% still highly functional", 0.8, FUNCTIONAL_MARGIN),
    ]
    return [*surgery_claims(curve, asked, **choice), cosine_claim(cmap), sink_claim(cmap)]
