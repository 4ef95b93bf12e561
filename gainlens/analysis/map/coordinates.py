"""The coordinate map: do layers use the same key units, beyond what chance gives?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gainlens.analysis.map import verdicts as map_verdicts
from gainlens.analysis.map.files import load_map, map_json, save_map
from gainlens.analysis.map.frequency_profile import FrequencyProfile, log_gains
from gainlens.analysis.map.heads import HeadSimilarity, head_similarity
from gainlens.analysis.map.layer_tests import all_tests, mean_of_heads
from gainlens.analysis.map.nulls import PairTest, measures, shuffled_orders
from gainlens.analysis.map.red_line import RedLine
from gainlens.analysis.map.sharing_cost import SharingCost
from gainlens.analysis.map.similarity import overlap_matrix, unit_length, variation
from gainlens.analysis.map.sinks import Sinks
from gainlens.analysis.map.stability import Stability
from gainlens.analysis.map.table import map_rows, measure_rows
from gainlens.analysis.map.units import Gains, Units, layer_profiles, source_facts, unit_gains
from gainlens.analysis.map.universal import (
    FDR,
    MIN_PRESENCE,
    Universal,
    top_sizes,
    universal_units,
)
from gainlens.errors import InputError
from gainlens.frames import data_frame
from gainlens.stats.verdicts import Verdict

PARTS = (HeadSimilarity, PairTest, SharingCost, RedLine, Sinks, Stability, Universal, Units)
"""What a map's file may hold beside the map."""

HEADS_LIMIT = 2048
"""More heads than this are not compared one by one unless asked: the cost is their square."""
HEADS_BUDGET = 10_000_000
"""Gains that the null of sharing by head may shuffle; at least 250 permutations are made."""


@dataclass(frozen=True, eq=False)
class CoordinateMap:
    """Similarity of gains between layers and heads, universal units, and the evidence for them.

    Layers are compared by the mean of their heads, each scaled to mean 1 first, so the order of
    heads doesn't matter. Where units rotate, what decides is what each layer's own smooth profile
    over log frequency leaves of its log gains; elsewhere what their mean leaves. A layer whose
    gains are all zero is kept in every array (similarity 0, p-value 1) and left out of every mean;
    ``facts["dead_layers"]`` lists it. A unit that is zero in every head takes no part.

    Attributes:
        units: what the last axis stands for.
        profiles: mean gain of each unit over the heads of a layer, ``[layer, unit]``.
        residuals: what is left of their logs without the profile, ``[layer, unit]``.
        alive: layers that carry anything.
        cosine, centred_cosine, spearman: of the gains of every pair of layers, ``[layer, layer]``.
        residual_correlation: of the residuals of every pair of layers, ``[layer, layer]``.
        head_correlation: the same for heads: mean over all heads of the one with all heads of the
            other layer, ``[layer, layer]``.
        overlap: Jaccard overlap of the k loudest units, by k.
        cv: coefficient of variation of each layer's gains, ``[layer]``; flat gains (a small CV)
            make any cosine high.
        tests: per null (``plain``, and ``frequency`` where units have one) and measure what
            shuffles give. ``plain`` has ``cosine``, ``centred``, ``spearman`` and ``top k``,
            ``frequency`` has ``cosine``; the one of the two that decides (``null``) has ``layer``
            and ``head``, the correlations of residuals.
        universal: how widely each unit is loud, in layers (their heads averaged).
        universal_by_head: the same, head by head.
        heads: heads against heads, and layers with their heads matched; None where not asked.
        n_documents: documents behind the gains (0 for a plain array).
        facts: score, stage, unit, alignment, permutations, seed, model, texts; ``freedom``,
            the dimensions that the profile leaves.
        sinks, red_line, sharing_cost, stability: None until ``with_evidence`` (or the function of
            that name) measured them on a model; gains alone can't tell.
    """

    units: Units
    profiles: Float[np.ndarray, "layer unit"]
    residuals: Float[np.ndarray, "layer unit"]
    alive: Int[np.ndarray, " living"]
    cosine: Float[np.ndarray, "layer layer2"]
    centred_cosine: Float[np.ndarray, "layer layer2"]
    spearman: Float[np.ndarray, "layer layer2"]
    residual_correlation: Float[np.ndarray, "layer layer2"]
    head_correlation: Float[np.ndarray, "layer layer2"]
    overlap: dict[int, np.ndarray]
    cv: Float[np.ndarray, " layer"]
    tests: dict[str, dict[str, PairTest]]
    universal: Universal
    universal_by_head: Universal
    heads: HeadSimilarity | None
    n_documents: int
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: Sinks | None = None
    red_line: RedLine | None = None
    sharing_cost: SharingCost | None = None
    stability: Stability | None = None

    def __repr__(self) -> str:
        missing = [n for n in ("sinks", "red_line", "sharing_cost") if getattr(self, n) is None]
        tail = f"; no {', '.join(missing)} yet (with_evidence)" if missing else ""
        return (
            f"CoordinateMap({len(self.cv)} layers × {len(self.units)} {self.units.kind}s, "
            f"{self.answer}: {map_verdicts.evidence_line(self)}; "
            f"{len(self.universal_units)} universal units, {len(self.universal.beyond_chance)} "
            f"beyond chance{tail})"
        )

    @property
    def null(self) -> str:
        """The null that decides: ``frequency`` where units rotate, else ``plain``."""
        return "frequency" if "frequency" in self.tests else "plain"

    @property
    def null_cosine(self) -> Float[np.ndarray, "layer layer2"]:
        """Exact mean cosine of each pair of layers over all shuffles of units (plain null)."""
        return self.tests["plain"]["cosine"].null_mean

    @property
    def frequency_null_cosine(self) -> Float[np.ndarray, "layer layer2"] | None:
        """Mean cosine over shuffles that keep each layer's profile; None without frequencies."""
        return self.tests["frequency"]["cosine"].null_mean if self.null == "frequency" else None

    @property
    def p_values(self) -> Float[np.ndarray, "layer layer2"]:
        """One-sided p-value of each pair's correlation of residuals, for the number of pairs."""
        return self.tests[self.null]["layer"].p_corrected

    @property
    def universal_units(self) -> tuple[int, ...]:
        """Units loud in more layers (heads averaged) than chance allows; see ``Universal``.

        Empty where the map's answer is not ``universal`` or ``partly shared``: a false-discovery
        rate of 5% alone would name some unit in 5 of 100 models that share nothing.
        """
        return self.universal.units if self.answer in map_verdicts.STATUS_SHARED else ()

    @property
    def universal_units_by_head(self) -> tuple[int, ...]:
        """Units loud in more single heads than chance allows; empty as above."""
        shared = self.answer_by_head in map_verdicts.STATUS_SHARED
        return self.universal_by_head.units if shared else ()

    @property
    def aligned(self) -> bool:
        """Whether index i means the same thing in two heads."""
        return bool(self.facts.get("aligned", True))

    @property
    def effect(self) -> float:
        """Mean correlation of residuals over pairs of living layers."""
        return self.correlation("layer")[0]

    @property
    def effect_interval(self) -> tuple[float, float]:
        """Its 95% jackknife interval over layers."""
        return self.correlation("layer")[1]

    def correlation(self, level: map_verdicts.Level = "layer") -> tuple[float, tuple[float, float]]:
        """Mean correlation of residuals between layers, or between heads of different layers.

        Returns:
            The mean and its 95% jackknife interval over layers.
        """
        found = self.residual_correlation if level == "layer" else self.head_correlation
        return float(self._pairs(found).mean()), map_verdicts.jackknife(
            found[np.ix_(self.alive, self.alive)]
        )

    @property
    def answer(self) -> map_verdicts.Answer:
        """Do layers share units beyond frequency? See ``gainlens.analysis.map.verdicts.answer``.

        ``universal``, ``partly shared``, ``not shared``; or ``too few layers to say``, ``too few
        units to say``, ``not comparable``.
        """
        return map_verdicts.answer(self)

    @property
    def answer_by_head(self) -> map_verdicts.Answer:
        """The same for single heads of different layers."""
        return map_verdicts.answer(self, "head")

    def _pairs(self, matrix: np.ndarray) -> np.ndarray:
        i, j = np.triu_indices(len(self.alive), 1)
        values: np.ndarray = matrix[self.alive[i], self.alive[j]]
        return values

    def summary(self) -> dict[str, float]:
        """Means over the pairs of different living layers, and the p-values of these means."""
        test = self.tests[self.null]
        found = {
            "residual_correlation": self.effect,
            "p": test["layer"].p_mean,
            "pairs_above_null": float((self._pairs(self.p_values) < 0.05).mean()),
            "residual_correlation_heads": self.correlation("head")[0],
            "p_heads": test["head"].p_mean,
            "cosine": float(self._pairs(self.cosine).mean()),
            "min_cosine": float(self._pairs(self.cosine).min()),
            "null_cosine": float(self._pairs(self.null_cosine).mean()),
            "centred_cosine": float(self._pairs(self.centred_cosine).mean()),
            "cv": float(self.cv[self.alive].mean()),
            "spearman": float(self._pairs(self.spearman).mean()),
            "p_plain": self.tests["plain"]["centred"].p_mean,
        }
        kept = self.frequency_null_cosine
        if kept is not None:
            found["null_cosine_frequency"] = float(self._pairs(kept).mean())
        return found

    def table(self) -> list[dict[str, Any]]:
        """One row per measure and null: its mean over pairs, what chance gives, p-values."""
        return measure_rows(self)

    def verdict(self, threshold: float | None = None, claim: str = "shared") -> Verdict:
        """What a claim about this map comes to.

        Args:
            threshold: the bound of the claim. For ``shared`` and ``shared by heads`` none by
                default: the verdict is then that of ``answer``. 0.99 for ``cosine``, 0.9 for
                ``sinks``, 0.02 nats for ``sharing cost``.
            claim: ``shared`` ("layers share units beyond frequency"), ``shared by heads`` (the
                same of single heads), ``cosine`` ("the cosine between layers is above 0.99: one
                coordinate system"), ``sinks`` ("a sink unit is a sink at every depth"),
                ``sharing cost`` ("sharing one index set costs next to nothing").

        Raises:
            InputError: an unknown claim, one whose evidence has not been measured, or a threshold
                outside 0..1 (for ``sharing cost``: not above 0).
        """
        if claim not in map_verdicts.CLAIMS:
            raise InputError(f"claim={claim!r} is not one of {', '.join(map_verdicts.CLAIMS)}")
        found: Verdict = map_verdicts.CLAIMS[claim](self, threshold)
        return found

    def to_json(self) -> dict[str, Any]:
        """Every number of the map as plain values; heads as their summary."""
        return map_json(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header."""
        save_map(self, path)

    @classmethod
    def load(cls, path: str | Path) -> CoordinateMap:
        """Read what ``save`` wrote; executes nothing.

        Raises:
            FileFormatError: missing, truncated, or not a map.
        """
        found: CoordinateMap = load_map(path, cls, PARTS)
        return found

    def to_dataframe(self, rows: str = "pairs") -> Any:
        """A table of the map.

        Args:
            rows: ``pairs`` (one row per pair of layers, every measure beside its null), ``units``
                (one per unit: wavelength, presence, p-values) or ``measures`` (as ``table``).

        Raises:
            InputError: other rows, or pandas is not installed.
        """
        return data_frame(map_rows(self, rows))

    def plot(self, ax: Any = None, *, part: str = "map") -> Any:
        """A figure of the map; shows nothing and returns the axes drawn on.

        Args:
            ax: matplotlib axes to draw into; new ones by default. For the whole ``map`` four (layer
                heat maps, unit × layer map, rank plot), or one for the unit × layer map alone.
            part: ``map``, ``sinks``, ``sharing_cost`` or ``red_line``.

        Raises:
            InputError: another part, or one that has not been measured.
        """
        from gainlens.plots.coordinate_maps import plot_part

        return plot_part(self, part, ax)

    def _repr_html_(self) -> str:
        from gainlens.plots.notebook import figure_html

        kind = self.units.kind
        return figure_html(
            self,
            f"Four panels: cosine between layers, what is left above its null, gain of each {kind} "
            f"by layer, and how present each {kind} is among the loudest. Answer: {self.answer}.",
            size=(13, 10),
            panels=(2, 2),
        )


def coordinate_map(
    gains: Gains,
    score: str = "rms",
    stage: str = "rotated",
    *,
    unit: str | None = None,
    frequency: Sequence[float] | Sequence[Sequence[float]] | np.ndarray | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
    heads: bool | None = None,
    fdr: float = FDR,
    min_presence: float = MIN_PRESENCE,
) -> CoordinateMap:
    """Compare the gains of all layers and heads, and find the units that they share.

    Args:
        gains: ``KeyGains``, ``CanonicalGains`` (models without rotary embeddings), or a
            non-negative array ``[layer, kv_head, unit]``.
        score, stage: of ``KeyGains``; ignored for an array.
        unit: ``pair`` (default where the model rotates) or ``dim``.
        frequency: for an array, radians per token of its units, ``[unit]``, or ``[layer, unit]``
            where layers rotate differently.
        n_permutations: of each null.
        seed: of the permutations.
        heads: compare head with head too; by default up to ``HEADS_LIMIT`` heads.
        fdr, min_presence: what makes a unit universal; see ``gainlens.analysis.map.universal``.

    Raises:
        InputError: one layer (or one that is not all zero) only, NaN, negative gains, another
            number of axes. One head per layer is fine: matching then has nothing to choose.

    Warns:
        UserWarning: a layer whose gains are all zero.

    Example:
        >>> cmap = gl.coordinate_map(gains)
        >>> cmap.answer, cmap.universal_units, cmap.verdict().status
    """
    _check_settings(n_permutations, fdr, min_presence)
    x, units = unit_gains(gains, score, stage, unit, frequency)
    profiles = layer_profiles(x)
    alive = np.flatnonzero(profiles.any(1))
    dead = [int(i) for i in np.flatnonzero(~profiles.any(1))]
    if len(alive) < 2:
        raise InputError(
            f"gains are all zero in layers {dead}: a map needs two layers that carry anything"
        )
    if dead:
        warnings.warn(f"gains of layers {dead} are all zero; they enter no mean", stacklevel=2)
    profile = FrequencyProfile.of(units.layer_frequency, np.asarray(profiles.any(0)))
    logs, head_logs = log_gains(profiles)[:, None], log_gains(x)
    residuals, head_residuals = profile.residuals(logs), profile.residuals(head_logs)
    orders = shuffled_orders(n_permutations, profile.groups, seed)
    some = orders[: max(250, HEADS_BUDGET // x.size)]
    tops = top_sizes(len(units))
    rows = measures(profiles, tops)
    tests = all_tests(
        profiles, rows, residuals[:, 0], head_residuals, profile, (orders, some), alive, seed
    )
    compare = len(x) * x.shape[1] <= HEADS_LIMIT if heads is None else heads
    layer_rows, head_rows = unit_length(residuals[:, 0]), mean_of_heads(head_residuals)
    bounds = (fdr, min_presence)
    return CoordinateMap(
        units=units,
        profiles=profiles,
        residuals=residuals[:, 0],
        alive=alive,
        cosine=rows["cosine"] @ rows["cosine"].T,
        centred_cosine=rows["centred"] @ rows["centred"].T,
        spearman=rows["spearman"] @ rows["spearman"].T,
        residual_correlation=layer_rows @ layer_rows.T,
        head_correlation=head_rows @ head_rows.T,
        overlap={k: overlap_matrix(rows[f"top {k}"] * np.sqrt(k)) for k in tops},
        cv=variation(profiles),
        tests=tests,
        universal=universal_units(logs, profile, profile.shuffled(residuals, orders), *bounds),
        universal_by_head=universal_units(
            head_logs, profile, profile.shuffled(head_residuals, some), *bounds
        ),
        heads=head_similarity(x, head_residuals, profile, orders, seed) if compare else None,
        n_documents=getattr(gains, "n_documents", 0),
        facts={
            **source_facts(gains, score, stage),
            "unit": units.kind,
            "n_heads": int(x.shape[1]),
            "dead_layers": dead,
            "freedom": profile.freedom,
            "n_permutations": n_permutations,
            "n_permutations_heads": len(some),
            "seed": seed,
        },
    )


def _check_settings(n_permutations: int, fdr: float, min_presence: float) -> None:
    if isinstance(n_permutations, bool) or n_permutations < 1:
        raise InputError(f"n_permutations={n_permutations} is not above 0")
    for name, value in (("fdr", fdr), ("min_presence", min_presence)):
        if not 0 < value < 1:
            raise InputError(f"{name}={value!r} is outside 0..1")
