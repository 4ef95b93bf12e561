"""Attention sinks: which units carry them in each layer, and whether these units persist.

A *sink head* is a key head whose queries give the first position far more attention than a uniform
distribution would. Its *sink units* are the smallest set of units that together account for half of
the logit advantage of the first key over the other keys. The advantage is measured as it enters the
softmax (q·k₀ minus the mean q·kⱼ, in nats), not by the size of the key: a first key near zero is
also a sink if the keys of all other positions share a component with negative logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gainlens.analysis.map.nulls import shuffled_orders
from gainlens.analysis.map.observation import KeyObservation
from gainlens.analysis.map.units import Units
from gainlens.analysis.map.verdicts import check_threshold, jackknife
from gainlens.errors import InputError
from gainlens.stats.verdicts import Status, Verdict

MIN_MASS = 0.25
"""A head is a sink head if its attention to the first position reaches this value."""
CARRIED = 0.5
"""Share of the first key's advantage that the sink units of a head account for."""
EVERY_DEPTH = 0.9
BAND_SIZE = 4
"""Neighbouring frequencies per band of the band null: narrow enough to follow a profile, wide
enough for a non-trivial shuffle within a band (4! orders per layer)."""


@dataclass(frozen=True, eq=False)
class Sinks:
    """Sink heads and sink units.

    Attributes:
        units: the units of the map.
        mass: mean attention of a key head's queries to position 0, ``[layer, kv_head]``.
        uniform: the value for uniform attention.
        advantage: each unit's part of the first key's advantage, nats,
            ``[layer, kv_head, unit]``.
        size: rms of the first key divided by that of keys from position 2 on, per unit.
        constancy: |E k₀|² / E|k₀|² over documents: 1 for a first key that is always the same.
        is_sink: True for the sink units of sink heads.
        min_mass, carried: the thresholds used.
        n_documents: number of documents in the text.
        nulls: chance level and p-values of the agreement between layers, per null.
    """

    units: Units
    mass: Float[np.ndarray, "layer kv_head"]
    uniform: float
    advantage: Float[np.ndarray, "layer kv_head unit"]
    size: Float[np.ndarray, "layer kv_head unit"]
    constancy: Float[np.ndarray, "layer kv_head unit"]
    is_sink: Bool[np.ndarray, "layer kv_head unit"]
    min_mass: float
    carried: float
    n_documents: int
    nulls: dict[str, dict[str, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Sinks({len(self.layers)} of {len(self.mass)} layers have sink heads, "
            f"{len(self.sink_units)} of {len(self.units)} units carry one somewhere)"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a sink head."""
        return tuple(int(i) for i in np.flatnonzero(self.is_sink.any((1, 2))))

    @property
    def sink_units(self) -> tuple[int, ...]:
        """Units that carry a sink in some head."""
        return tuple(int(i) for i in np.flatnonzero(self.is_sink.any((0, 1))))

    @property
    def per_layer(self) -> Bool[np.ndarray, "layer unit"]:
        """Whether a unit carries a sink in any head of a layer."""
        found: Bool[np.ndarray, "layer unit"] = np.asarray(self.is_sink.any(1))
        return found

    def persistence(self) -> float:
        """The probability that a sink unit of one sink layer is one in another; NaN below two."""
        marks = self.per_layer[list(self.layers)].astype(np.float64)
        return float("nan") if len(marks) < 2 else _agreement(marks)[0]

    def table(self) -> list[dict[str, Any]]:
        """One row per sink unit of each sink head, by layer."""
        wavelength = self.units.wavelength
        total = np.clip(self.advantage, 0, None).sum(-1)
        return [
            {
                "layer": int(layer),
                "kv_head": int(head),
                "unit": int(u),
                "frequency": float(self.units.layer_frequency[layer, u]),
                "wavelength": wavelength[u],
                "attention_to_first": float(self.mass[layer, head]),
                "advantage_nats": float(self.advantage[layer, head, u]),
                "share_of_advantage": float(self.advantage[layer, head, u] / total[layer, head]),
                "size_of_first_key": float(self.size[layer, head, u]),
                "constancy": float(self.constancy[layer, head, u]),
            }
            for layer, head, u in np.argwhere(self.is_sink)
        ]

    def through_depth(self) -> list[dict[str, Any]]:
        """One row per sink unit with the layers in which it carries a sink, most frequent first."""
        marks = self.per_layer
        rows = [
            {
                "unit": u,
                "frequency": float(self.units.frequency[u]),
                "wavelength": self.units.wavelength[u],
                "layers": [int(i) for i in np.flatnonzero(marks[:, u])],
                "share_of_sink_layers": float(marks[:, u].sum() / max(1, len(self.layers))),
                "largest_advantage_nats": float(self.advantage[..., u][self.is_sink[..., u]].max()),
            }
            for u in self.sink_units
        ]
        return sorted(rows, key=lambda r: (-r["share_of_sink_layers"], r["unit"]))

    def verdict(self, threshold: float = EVERY_DEPTH) -> Verdict:
        """ "A sink unit is a sink at every depth".

        The estimate is the probability that a sink unit of one layer is also one in another layer
        with sinks, with a jackknife interval over layers.

        Raises:
            InputError: a threshold outside 0..1.
        """
        check_threshold(threshold)
        marks = self.per_layer[list(self.layers)].astype(np.float64)
        claim = f"a sink unit is a sink at every depth (in {threshold:.0%} of layers with sinks)"
        if len(marks) < 3:
            return Verdict(
                "undecided", claim, 0.0, (0.0, 1.0), threshold, self.n_documents,
                f"{len(marks)} layers have a sink head (attention to the first position of "
                f"{self.min_mass:g} or more): expected three",
            )  # fmt: skip
        estimate, matrix = _agreement(marks)
        low, high = jackknife(matrix)
        status: Status = "undecided"
        if low > threshold:
            status = "holds"
        elif high < threshold:
            status = "fails"
        null = "; ".join(
            f"{name} null {n['chance']:.3f} (p = {n['p']:.2g})" for name, n in self.nulls.items()
        )
        at_most = max(r["share_of_sink_layers"] for r in self.through_depth())
        return Verdict(
            status, claim, estimate, (low, high), threshold, self.n_documents,
            f"{null}; {len(marks)} layers have sink heads, the most persistent unit carries one in "
            f"{at_most:.0%} of them; median size of the first key there "
            f"{float(np.median(self.size[self.is_sink])):.2f} of other keys",
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "layers": list(self.layers),
            "units": list(self.sink_units),
            "persistence": self.persistence(),
            "nulls": self.nulls,
            "min_mass": self.min_mass,
            "carried": self.carried,
            "uniform": self.uniform,
            "mass": self.mass,
            "n_documents": self.n_documents,
            "through_depth": self.through_depth(),
            "table": self.table(),
        }


def _agreement(
    marks: Float[np.ndarray, "layer unit"],
) -> tuple[float, Float[np.ndarray, "layer layer2"]]:
    """Mean over ordered pairs of layers of |A ∩ B| / |A|, and the symmetric matrix behind it."""
    common = marks @ marks.T
    share = common / marks.sum(1)[:, None]
    matrix = (share + share.T) / 2
    above = np.triu_indices(len(marks), 1)
    return float(matrix[above].mean()), matrix


def find_sinks(
    observation: KeyObservation,
    units: Units,
    *,
    min_mass: float = MIN_MASS,
    carried: float = CARRIED,
    n_permutations: int = 1000,
    seed: int = 0,
) -> Sinks:
    """Find sink heads and sink units in the result of ``observe_keys``.

    Args:
        observation: statistics of the text.
        units: the units of the map.
        min_mass: minimal attention to the first position for a sink head.
        carried: share of the advantage that the sink units of a head account for.
        n_permutations, seed: settings of the nulls for agreement between layers. Units are
            shuffled per layer, freely or within frequency bands.

    Raises:
        InputError: a threshold is outside 0..1.
    """
    for name, value in (("min_mass", min_mass), ("carried", carried)):
        if not 0 < value < 1:
            raise InputError(f"{name}={value!r} is outside 0..1")
    advantage = observation.advantage
    layers, heads, _ = advantage.shape
    mass = observation.mass[..., 0].reshape(layers, heads, -1).mean(-1)
    positive = np.clip(advantage, 0, None)
    order = np.argsort(-positive, axis=-1)
    ranked = np.take_along_axis(positive, order, -1)
    before = ranked.cumsum(-1) - ranked
    needed = (before < carried * positive.sum(-1, keepdims=True)) & (ranked > 0)
    is_sink = np.zeros(advantage.shape, dtype=bool)
    np.put_along_axis(is_sink, order, needed, -1)
    is_sink &= (mass >= min_mass)[..., None]
    later = observation.rms[:, 2:] if observation.rms.shape[1] > 2 else observation.rms[:, 1:]
    typical = np.sqrt((later**2).mean(1))
    first = observation.first_rms
    return Sinks(
        units=units,
        mass=mass,
        uniform=observation.uniform,
        advantage=advantage,
        size=np.divide(first, typical, out=np.zeros_like(first), where=typical > 0),
        constancy=np.divide(
            observation.first_mean**2, first**2, out=np.zeros_like(first), where=first > 0
        ),
        is_sink=is_sink,
        min_mass=min_mass,
        carried=carried,
        n_documents=observation.n_documents,
        nulls=_depth_nulls(np.asarray(is_sink.any(1)), units, n_permutations, seed),
    )


def _depth_nulls(
    marks: Bool[np.ndarray, "layer unit"], units: Units, n_permutations: int, seed: int
) -> dict[str, dict[str, float]]:
    """The agreement between layers for shuffled sink units."""
    living = marks[marks.any(1)].astype(np.float64)
    if len(living) < 2:
        return {}
    seen = _agreement(living)[0]
    found = {}
    bands = frequency_bands(units.frequency)
    nulls = {"plain": np.zeros_like(bands)}
    if (units.frequency > 0).any():
        nulls["band"] = bands
    for i, (name, groups) in enumerate(nulls.items()):
        orders = shuffled_orders(n_permutations, np.tile(groups, (len(living), 1)), seed + i)
        draws = [_agreement(np.take_along_axis(living, order, 1))[0] for order in orders]
        p = (1 + int((np.array(draws) >= seen - 1e-9).sum())) / (1 + n_permutations)
        found[name] = {"chance": float(np.mean(draws)), "p": p}
    return found


def frequency_bands(
    frequency: Float[np.ndarray, " unit"], size: int = BAND_SIZE
) -> Int[np.ndarray, " unit"]:
    """Group units of neighbouring frequency; units that do not rotate form their own band.

    Rotary frequencies form a geometric series, so bands of equal size have equal width in log
    frequency. The dimensions of a pair have the same frequency and thus the same band.
    """
    distinct = np.unique(frequency[frequency > 0])[::-1]
    n_bands = max(1, len(distinct) // size)
    band_of = {f: min(i // size, n_bands - 1) for i, f in enumerate(distinct)}
    return np.array([band_of.get(f, n_bands) for f in frequency], dtype=np.int64)
