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
from gainlens.analysis.map.canonical import CanonicalGains
from gainlens.analysis.map.files import load_map, map_json, save_map
from gainlens.analysis.map.heads import HeadSimilarity, head_similarity
from gainlens.analysis.map.nulls import PairTest, measures, pair_test, shuffled_orders
from gainlens.analysis.map.red_line import RedLine
from gainlens.analysis.map.sharing_cost import Price
from gainlens.analysis.map.similarity import overlap_matrix, variation
from gainlens.analysis.map.sinks import Sinks
from gainlens.analysis.map.stability import Stability
from gainlens.analysis.map.table import map_rows, measure_rows
from gainlens.analysis.map.units import Gains, Units, unit_gains
from gainlens.analysis.map.universal import (
    FDR,
    MIN_PRESENCE,
    Universal,
    top_sizes,
    universal_units,
)
from gainlens.errors import InputError
from gainlens.frames import data_frame
from gainlens.probes.gains import KeyGains
from gainlens.stats.verdicts import Verdict

PARTS = (HeadSimilarity, PairTest, Price, RedLine, Sinks, Stability, Universal, Units)
"""What a map's file may hold beside the map."""

HEADS_LIMIT = 2048
"""More heads than this are not compared one by one unless asked: the cost is their square."""


@dataclass(frozen=True, eq=False)
class CoordinateMap:
    """Similarity of gains between layers and heads, universal units, and the evidence for them.

    Layers are compared by the mean of their heads, each scaled to mean 1 first, so the order of
    heads doesn't matter. A layer whose gains are all zero is kept in every array (similarity 0,
    p-value 1) and left out of every mean; ``facts["dead_layers"]`` lists it.

    Attributes:
        units: what the last axis stands for.
        profiles: mean gain of each unit over the heads of a layer, ``[layer, unit]``.
        alive: layers that carry anything.
        cosine, centred_cosine, spearman: of every pair of layers, ``[layer, layer]``.
        overlap: Jaccard overlap of the k loudest units, by k.
        cv: coefficient of variation of each layer's gains, ``[layer]``; flat gains (a small CV)
            make any cosine high.
        tests: per null (``plain``, and ``band`` where units have a frequency) and measure
            (``cosine``, ``centred``, ``spearman``, ``top k``) what shuffles give.
        universal: how widely each unit is loud.
        heads: heads against heads, and layers with their heads matched; None where not asked.
        n_documents: documents behind the gains (0 for a plain array).
        facts: score, stage, unit, alignment, permutations, seed, model, texts.
        sinks, red_line, price, stability: None until ``with_evidence`` (or the function of that
            name) measured them on a model; gains alone can't tell.
    """

    units: Units
    profiles: Float[np.ndarray, "layer unit"]
    alive: Int[np.ndarray, " living"]
    cosine: Float[np.ndarray, "layer layer2"]
    centred_cosine: Float[np.ndarray, "layer layer2"]
    spearman: Float[np.ndarray, "layer layer2"]
    overlap: dict[int, np.ndarray]
    cv: Float[np.ndarray, " layer"]
    tests: dict[str, dict[str, PairTest]]
    universal: Universal
    heads: HeadSimilarity | None
    n_documents: int
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: Sinks | None = None
    red_line: RedLine | None = None
    price: Price | None = None
    stability: Stability | None = None

    def __repr__(self) -> str:
        missing = [n for n in ("sinks", "red_line", "price") if getattr(self, n) is None]
        tail = f"; no {', '.join(missing)} yet (with_evidence)" if missing else ""
        return (
            f"CoordinateMap({len(self.cv)} layers × {len(self.units)} {self.units.kind}s, "
            f"{self.answer}: {map_verdicts.evidence_line(self)}; "
            f"{len(self.universal_units)} universal units, {len(self.universal.beyond_chance)} "
            f"beyond chance{tail})"
        )

    @property
    def null_cosine(self) -> Float[np.ndarray, "layer layer2"]:
        """Exact mean cosine of each pair of layers over all shuffles of units (plain null)."""
        return self.tests["plain"]["cosine"].null_mean

    @property
    def null_high(self) -> Float[np.ndarray, "layer layer2"]:
        """95th percentile of the cosine over the shuffles."""
        return self.tests["plain"]["cosine"].null_high

    @property
    def band_null_cosine(self) -> Float[np.ndarray, "layer layer2"] | None:
        """As ``null_cosine``, shuffling within frequency bands; None without frequencies."""
        return self.tests["band"]["cosine"].null_mean if "band" in self.tests else None

    @property
    def p_values(self) -> Float[np.ndarray, "layer layer2"]:
        """One-sided p-value of each pair's cosine, corrected for the number of pairs."""
        return self.tests["plain"]["cosine"].p_corrected

    @property
    def universal_units(self) -> tuple[int, ...]:
        """Units among the loudest in more layers than chance allows; see ``Universal``.

        Empty where the map's answer is ``not shared``: a false-discovery rate of 5% alone would
        name some unit in 5 of 100 models that share nothing.
        """
        return () if self.answer == "not shared" else self.universal.units

    @property
    def aligned(self) -> bool:
        """Whether index i means the same thing in two heads."""
        return bool(self.facts.get("aligned", True))

    @property
    def effect(self) -> float:
        """Mean centred cosine over pairs of living layers."""
        return float(self._pairs(self.centred_cosine).mean())

    @property
    def effect_interval(self) -> tuple[float, float]:
        """Its 95% jackknife interval over layers."""
        return map_verdicts.jackknife(self.centred_cosine[np.ix_(self.alive, self.alive)])

    @property
    def answer(self) -> str:
        """``universal``, ``partly shared`` or ``not shared``; see ``map_verdicts.answer``."""
        return map_verdicts.answer(self)

    def _pairs(self, matrix: np.ndarray) -> np.ndarray:
        i, j = np.triu_indices(len(self.alive), 1)
        values: np.ndarray = matrix[self.alive[i], self.alive[j]]
        return values

    def summary(self) -> dict[str, float]:
        """Means over the pairs of different living layers, and the p-values of these means."""
        plain = self.tests["plain"]
        found = {
            "cosine": float(self._pairs(self.cosine).mean()),
            "min_cosine": float(self._pairs(self.cosine).min()),
            "null_cosine": float(self._pairs(self.null_cosine).mean()),
            "centred_cosine": self.effect,
            "cv": float(self.cv[self.alive].mean()),
            "spearman": float(self._pairs(self.spearman).mean()),
            "p_plain": plain["centred"].p_mean,
            "pairs_above_null": float((self._pairs(self.p_values) < 0.05).mean()),
        }
        if "band" in self.tests:
            band = self.tests["band"]
            found["null_cosine_band"] = float(self._pairs(band["cosine"].null_mean).mean())
            found["null_centred_band"] = float(self._pairs(band["centred"].null_mean).mean())
            found["p_band"] = band["centred"].p_mean
            found["pairs_above_band_null"] = float(
                (self._pairs(band["cosine"].p_corrected) < 0.05).mean()
            )
        return found

    def table(self) -> list[dict[str, Any]]:
        """One row per measure and null: its mean over pairs, what chance gives, p-values."""
        return measure_rows(self)

    def verdict(self, threshold: float | None = None, claim: str = "cosine") -> Verdict:
        """What a claim about this map comes to.

        Args:
            threshold: the bound of the claim; by default 0.99 for ``cosine``, 0.5 for
                ``shared``, 0.05 nats for ``price``.
            claim: ``cosine`` ("the cosine between layers is above 0.99: one coordinate
                system"), ``shared`` ("layers use the same units"), ``sinks`` ("a sink unit is a
                sink at every depth"), ``price`` ("sharing one index set costs next to nothing").

        Raises:
            InputError: an unknown claim, or one whose evidence has not been measured.
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
            part: ``map``, ``sinks``, ``price`` or ``red_line``.

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
    frequency: Sequence[float] | np.ndarray | None = None,
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
        frequency: for an array, radians per token of its units, for the band null.
        n_permutations: of each null.
        seed: of the permutations.
        heads: compare head with head too; by default up to ``HEADS_LIMIT`` heads.
        fdr, min_presence: what makes a unit universal; see ``gainlens.analysis.map.universal``.

    Raises:
        InputError: one layer (or one that is not all zero) only, NaN, negative gains, another
            number of axes. One head per layer is fine: matching then has nothing to choose.

    Warns:
        UserWarning: a layer whose gains are all zero.
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
    nulls = {"plain": None} if units.bands is None else {"plain": None, "band": units.bands}
    orders = {
        name: shuffled_orders(n_permutations, len(x), bands, len(units), seed + i)
        for i, (name, bands) in enumerate(nulls.items())
    }
    tops = top_sizes(len(units))
    rows = measures(profiles, tops)
    compare = len(x) * x.shape[1] <= HEADS_LIMIT if heads is None else heads
    return CoordinateMap(
        units=units,
        profiles=profiles,
        alive=alive,
        cosine=rows["cosine"] @ rows["cosine"].T,
        centred_cosine=rows["centred"] @ rows["centred"].T,
        spearman=rows["spearman"] @ rows["spearman"].T,
        overlap={k: overlap_matrix(rows[f"top {k}"] * np.sqrt(k)) for k in tops},
        cv=variation(profiles),
        tests={
            name: {
                measure: pair_test(values, orders[name], bands, alive)
                for measure, values in rows.items()
            }
            for name, bands in nulls.items()
        },
        universal=universal_units(x, orders, units.bands, fdr, min_presence),
        heads=head_similarity(x, orders, units.bands, seed) if compare else None,
        n_documents=getattr(gains, "n_documents", 0),
        facts={
            **_source(gains, score, stage),
            "unit": units.kind,
            "n_heads": int(x.shape[1]),
            "dead_layers": dead,
            "n_permutations": n_permutations,
            "seed": seed,
        },
    )


def layer_profiles(
    x: Float[np.ndarray, "layer kv_head unit"],
) -> Float[np.ndarray, "layer unit"]:
    """Mean over living heads, each scaled to mean 1; an all-zero layer stays zero."""
    mean = x.mean(-1, keepdims=True)
    scaled = np.divide(x, mean, out=np.zeros_like(x), where=mean > 0)
    living = (mean[..., 0] > 0).sum(1, keepdims=True)
    profiles: Float[np.ndarray, "layer unit"] = scaled.sum(1) / np.maximum(living, 1)
    return profiles


def _check_settings(n_permutations: int, fdr: float, min_presence: float) -> None:
    if isinstance(n_permutations, bool) or n_permutations < 1:
        raise InputError(f"n_permutations={n_permutations} is not above 0")
    for name, value in (("fdr", fdr), ("min_presence", min_presence)):
        if not 0 < value < 1:
            raise InputError(f"{name}={value!r} is outside 0..1")


def _source(gains: Gains, score: str, stage: str) -> dict[str, Any]:
    """Where the gains come from and what makes index i comparable between heads."""
    if isinstance(gains, KeyGains):
        from dataclasses import asdict

        rotates = bool(gains.model.rotary_dim)
        return {
            "score": score,
            "stage": stage,
            "model": asdict(gains.model),
            "texts": list(gains.texts),
            "n_tokens": gains.n_tokens,
            "aligned": rotates,
            "alignment": (
                "units compared by rotary frequency, heads by optimal assignment"
                if rotates
                else "no alignment: without rotary embeddings key dimension i of two heads is not "
                "the same thing (canonical_gains puts each head into its canonical basis)"
            ),
        }
    if isinstance(gains, CanonicalGains):
        from dataclasses import asdict

        return {
            "score": score,
            "stage": "projected",
            "model": asdict(gains.model),
            "n_tokens": gains.n_tokens,
            "aligned": False,
            "alignment": (
                "each head in its canonical basis (SVD of W_Q W_Kᵀ with biases), heads by optimal "
                "assignment; index i is the i-th largest singular value, so layers agree in it by "
                "construction: likeness of spectra, not one coordinate system"
            ),
        }
    return {
        "score": "array",
        "stage": "array",
        "aligned": True,
        "alignment": "units compared by index as given, heads by optimal assignment",
    }
