"""Comparison of two maps: of two models, or of two checkpoints of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import hypergeom

from gainlens.analysis.map.coordinates import CoordinateMap
from gainlens.analysis.map.frequency_profile import FrequencyProfile
from gainlens.analysis.map.nulls import TOLERANCE, shuffled_orders
from gainlens.analysis.map.similarity import centred_rows, unit_length
from gainlens.errors import InputError


@dataclass(frozen=True, eq=False)
class MapComparison:
    """What two maps have in common beyond a shared dependence on frequency.

    The null shuffles the residuals of the second map layer by layer; see ``frequency_profile``.

    Attributes:
        a, b: the maps.
        cosine, centred: every layer of ``a`` against every layer of ``b``, ``[layer_a, layer_b]``.
        partner: for each layer of ``a`` the layer of ``b`` at the same relative depth.
        same_depth: correlation of residuals at the same depth, ``[layer_a]``. For two checkpoints
            of one model, it measures how similar each layer has stayed.
        null_high: 95th percentile of the mean of ``same_depth`` over shuffles.
        p_value: one-sided p-value of that mean.
        common: units that are universal in both.
        gained, lost: units that are universal only in ``b``, or only in ``a``.
        p_common: probability of at least this many common units by chance (hypergeometric).
        same_frequencies: whether unit i has the same frequency in both. If not, equal indices do
            not mean equal frequencies.
    """

    a: CoordinateMap
    b: CoordinateMap
    cosine: Float[np.ndarray, "layer_a layer_b"]
    centred: Float[np.ndarray, "layer_a layer_b"]
    partner: np.ndarray
    same_depth: Float[np.ndarray, " layer_a"]
    null_high: float
    p_value: float
    common: tuple[int, ...]
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    p_common: float
    same_frequencies: bool

    def __repr__(self) -> str:
        return (
            f"MapComparison({self.a.answer} → {self.b.answer}; correlation at equal depth "
            f"{self.same_depth.mean():.3f} (95% of shuffles below {self.null_high:.3f}, p = "
            f"{self.p_value:.2g}); universal units: {len(self.common)} in both, "
            f"{len(self.gained)} gained, {len(self.lost)} lost)"
        )

    def summary(self) -> dict[str, Any]:
        """Summaries of both maps, and what changed."""
        first, second = self.a.summary(), self.b.summary()
        return {
            "answer": [self.a.answer, self.b.answer],
            "a": first,
            "b": second,
            "change": {k: second[k] - first[k] for k in first if k in second},
            "same_depth_correlation": float(self.same_depth.mean()),
            "null_high": self.null_high,
            "p_value": self.p_value,
            "common": list(self.common),
            "gained": list(self.gained),
            "lost": list(self.lost),
            "p_common": self.p_common,
            "same_frequencies": self.same_frequencies,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        from gainlens.analysis.map.files import plain

        found: dict[str, Any] = plain(
            {
                **self.summary(),
                "same_depth": self.same_depth,
                "partner": self.partner,
                "cosine": self.cosine,
                "centred": self.centred,
            }
        )
        return found

    def plot(self, ax: Any = None) -> Any:
        """Layer similarity, change per layer, and presence in both maps; returns the axes."""
        from gainlens.plots.coordinate_maps import plot_comparison

        return plot_comparison(self, ax)


def compare_maps(
    a: CoordinateMap, b: CoordinateMap, *, n_permutations: int = 1000, seed: int = 0
) -> MapComparison:
    """Compare two maps unit by unit and layer by layer.

    Args:
        a, b: maps with equally many units per head; the numbers of layers and heads may differ.
        n_permutations, seed: settings of the null.

    Raises:
        InputError: the heads have different widths, or the units are of different kinds.
    """
    if len(a.units) != len(b.units) or a.units.kind != b.units.kind:
        raise InputError(
            f"maps cannot be compared: a has {len(a.units)} {a.units.kind}s per head, b has "
            f"{len(b.units)} {b.units.kind}s; expected heads of the same width"
        )
    if n_permutations < 1:
        raise InputError(f"n_permutations={n_permutations} is not above 0")
    n_a, n_b, n = len(a.cv), len(b.cv), len(a.units)
    partner = np.rint(np.linspace(0, n_b - 1, n_a)).astype(int)
    rows_a, rows_b = unit_length(a.residuals), unit_length(b.residuals)
    same = (rows_a * rows_b[partner]).sum(1)
    profile = FrequencyProfile.of(b.units.layer_frequency, np.asarray(b.profiles.any(0)))
    orders = shuffled_orders(n_permutations, profile.groups, seed)
    draws = np.concatenate(
        [
            (rows_a * unit_length(moved[:, :, 0])[:, partner]).sum(-1).mean(-1)
            for moved in profile.shuffled(b.residuals[:, None], orders)
        ]
    )
    first, second = set(a.universal_units), set(b.universal_units)
    common = first & second
    return MapComparison(
        a=a,
        b=b,
        cosine=unit_length(a.profiles) @ unit_length(b.profiles).T,
        centred=centred_rows(a.profiles) @ centred_rows(b.profiles).T,
        partner=partner,
        same_depth=same,
        null_high=float(np.quantile(draws, 0.95)),
        p_value=float((1 + (draws >= same.mean() - TOLERANCE).sum()) / (1 + n_permutations)),
        common=tuple(sorted(common)),
        gained=tuple(sorted(second - first)),
        lost=tuple(sorted(first - second)),
        p_common=float(hypergeom.sf(len(common) - 1, n, len(first), len(second))),
        same_frequencies=bool(np.allclose(a.units.frequency, b.units.frequency, rtol=1e-3)),
    )
