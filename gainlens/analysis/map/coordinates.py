"""The coordinate map: do layers use the same key units more than by chance?"""

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
from gainlens.analysis.map.heads import HEADS_BUDGET, HEADS_LIMIT, HeadSimilarity, head_similarity
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
from gainlens.plots.notebook import Display, Displayed
from gainlens.stats.verdicts import Verdict

PARTS = (HeadSimilarity, PairTest, SharingCost, RedLine, Sinks, Stability, Universal, Units)
"""Other classes that a map file may contain."""


@dataclass(frozen=True, eq=False)
class CoordinateMap(Displayed):
    """Similarity of gains between layers and heads, universal units, and the evidence for them.

    Layers are compared by the mean of their heads, each first scaled to mean 1, so the order of
    heads does not matter. The answer is based on residuals: the log gains of each layer minus its
    smooth profile over log frequency if units rotate, and minus their mean otherwise. A layer whose
    gains are all zero stays in every array (similarity 0, p-value 1) but is excluded from every
    mean; ``facts["dead_layers"]`` lists it. A unit that is zero in every head is excluded.

    Attributes:
        units: what the last axis stands for.
        profiles: mean gain of each unit over the heads of a layer, ``[layer, unit]``.
        residuals: their logs minus the profile, ``[layer, unit]``.
        alive: layers with a gain above zero.
        cosine, centred_cosine, spearman: similarity of the gains of two layers, ``[layer, layer]``.
        residual_correlation: correlation of the residuals of two layers, ``[layer, layer]``.
        head_correlation: the mean of the same over all pairs of their heads, ``[layer, layer]``.
        overlap: Jaccard overlap of the k loudest units, by k.
        cv: coefficient of variation of each layer's gains, ``[layer]``; flat gains (a small CV)
            give a high cosine in any case.
        tests: test results per null (``plain``, and ``frequency`` if units have one) and
            measure. ``plain`` has ``cosine``, ``centred``, ``spearman`` and ``top k``,
            ``frequency`` has ``cosine``. The null that is used for the answer (``null``) also
            has ``layer`` and ``head``, the correlations of residuals.
        universal: in how many layers each unit is loud (heads averaged).
        universal_by_head: the same, head by head.
        heads: similarity of heads, and of layers with matched heads; None if not requested.
        n_documents: documents behind the gains (0 for a plain array).
        facts: score, stage, unit, alignment, permutations, seed, model, texts; ``freedom``,
            the dimensions left after the profile is removed.
        sinks, red_line, sharing_cost, stability: None until measured on a model, by
            ``with_evidence`` or their own function; they cannot be derived from gains.

    Example:
        >>> cmap.save("map.safetensors")
        >>> again = gl.CoordinateMap.load("map.safetensors")
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
            f"{self.answer}: correlation {self.effect:.3f} (p = {self.summary()['p']:.2g}), "
            f"cosine {self.summary()['cosine']:.3f}; "
            f"{len(self.universal_units)} universal units, {len(self.universal.beyond_chance)} "
            f"beyond chance{tail})"
        )

    @property
    def null(self) -> str:
        """The null used for the answer: ``frequency`` if units rotate, else ``plain``."""
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
        """One-sided p-values of residual correlations, corrected for the number of pairs."""
        return self.tests[self.null]["layer"].p_corrected

    @property
    def universal_units(self) -> tuple[int, ...]:
        """Units loud in more layers (heads averaged) than chance allows; see ``Universal``.

        Empty unless the map's answer is ``universal`` or ``partly shared``: a false-discovery
        rate of 5% alone would report a unit in 5 of 100 models that share nothing.
        """
        return self.universal.units if self.answer in map_verdicts.STATUS_SHARED else ()

    @property
    def universal_units_by_head(self) -> tuple[int, ...]:
        """Units loud in more single heads than chance allows; empty as above."""
        shared = self.answer_by_head in map_verdicts.STATUS_SHARED
        return self.universal_by_head.units if shared else ()

    @property
    def aligned(self) -> bool:
        """Whether index i is comparable between heads."""
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
        """Mean correlation of residuals; ``level="head"``: between heads of different layers.

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
        """Like ``answer``, for single heads of different layers."""
        return map_verdicts.answer(self, "head")

    def _pairs(self, matrix: np.ndarray) -> np.ndarray:
        i, j = np.triu_indices(len(self.alive), 1)
        values: np.ndarray = matrix[self.alive[i], self.alive[j]]
        return values

    def summary(self) -> dict[str, float]:
        """Means over pairs of distinct living layers, and the p-values of these means."""
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
        """One row per measure and null: its mean over pairs, its chance level and p-values."""
        return measure_rows(self)

    def verdict(self, threshold: float | None = None, claim: str = "shared") -> Verdict:
        """The verdict on a claim about this map.

        Args:
            threshold: the bound of the claim. Defaults: none for ``shared`` and ``shared by
                heads`` (the verdict then follows ``answer``), 0.99 for ``cosine``, 0.9 for
                ``sinks``, 0.02 nats for ``sharing cost``.
            claim: ``shared`` ("layers share units beyond frequency"), ``shared by heads`` (the
                same for single heads), ``cosine`` ("the cosine between layers is above 0.99: one
                coordinate system"), ``sinks`` ("a sink unit is a sink at every depth"),
                ``sharing cost`` ("sharing one index set costs next to nothing").

        Raises:
            InputError: the claim is unknown, its evidence was not measured, or the threshold is
                outside 0..1 (for ``sharing cost``: not above 0).
        """
        if claim not in map_verdicts.CLAIMS:
            raise InputError(f"claim={claim!r} is not one of {', '.join(map_verdicts.CLAIMS)}")
        found: Verdict = map_verdicts.CLAIMS[claim](self, threshold)
        return found

    def to_json(self) -> dict[str, Any]:
        """Every number of the map as plain values, with a summary of the heads."""
        return map_json(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header."""
        save_map(self, path)

    @classmethod
    def load(cls, path: str | Path) -> CoordinateMap:
        """Read a file written by ``save``; executes no code.

        Raises:
            FileFormatError: the file is missing, truncated or not a map.
        """
        found: CoordinateMap = load_map(path, cls, PARTS)
        return found

    def to_dataframe(self, rows: str = "pairs") -> Any:
        """A table of the map.

        Args:
            rows: ``pairs`` (one row per pair of layers, every measure with its null), ``units``
                (one per unit: wavelength, presence, p-values) or ``measures`` (as ``table``).

        Raises:
            InputError: ``rows`` is unknown, or pandas is not installed.
        """
        return data_frame(map_rows(self, rows))

    def plot(self, ax: Any = None, *, part: str = "map") -> Any:
        """Draw a figure of the map; returns the axes without showing.

        Args:
            ax: matplotlib axes to draw into; new ones by default. ``map`` needs four (layer heat
                maps, unit × layer map, rank plot), or one for only the unit × layer map.
            part: ``map``, ``sinks``, ``sharing_cost`` or ``red_line``.

        Raises:
            InputError: the part is unknown or has not been measured.
        """
        from gainlens.plots.coordinate_maps import plot_part

        return plot_part(self, part, ax)

    def _display(self) -> Display:
        from gainlens.plots.markup.results import map_panels

        kind = self.units.kind
        return Display(
            f"Cosine between layers, what is left above its null, gain of each {kind} "
            f"by layer, and how present each {kind} is among the loudest. Answer: {self.answer}.",
            lambda alt: map_panels(self, alt),
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
        score, stage: which gains of ``KeyGains`` to use; ignored for an array.
        unit: ``pair`` (default if the model rotates its keys) or ``dim``.
        frequency: for an array, radians per token of its units, ``[unit]``, or ``[layer, unit]``
            if layers rotate differently.
        n_permutations: number of permutations for each null.
        seed: seed of the permutations.
        heads: also compare single heads; by default up to ``HEADS_LIMIT`` heads.
        fdr, min_presence: criteria for a universal unit; see ``gainlens.analysis.map.universal``.

    Raises:
        InputError: fewer than two layers with a gain above zero, NaN, negative gains, or a wrong
            number of axes. One head per layer is allowed.

    Warns:
        UserWarning: the gains of a layer are all zero.

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
            f"gains are all zero in layers {dead}: a map needs two layers with a gain above zero"
        )
    if dead:
        warnings.warn(
            f"gains of layers {dead} are all zero; they are excluded from every mean", stacklevel=2
        )
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
    head_shuffled = profile.shuffled(head_residuals, some)
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
        universal_by_head=universal_units(head_logs, profile, head_shuffled, *bounds),
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
    for name, x in (("fdr", fdr), ("min_presence", min_presence)):
        if not 0 < x < 1:
            raise InputError(f"{name}={x!r} is outside 0..1")
