"""Universal indices: units that are among the loudest in more layers than chance allows.

For every k the number of (layer, head) is counted in which a unit is among the k loudest. Under
the null (see ``gainlens.analysis.map.nulls``: units of each layer shuffled, one order for all of
its heads) the mean and variance of that count follow exactly from the counts per layer, with the
dependence between the heads of a layer in them. How many units are loud isn't known beforehand
(at a k below the number of shared units they compete for places, so no single k would do): a
unit's evidence is its smallest p-value over k, and the shuffles take the same minimum.

A unit is *universal* when its p-value passes Benjamini and Hochberg's procedure (1995) over all
units, and its presence is large: the largest over k of (share of heads - k/n) / (1 - k/n), which is
0 for chance and 1 for a unit that is loud everywhere, is at least ``min_presence``. With enough
layers a trifle is significant; the second condition asks whether it matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gainlens.analysis.map.nulls import Orders, in_chunks
from gainlens.analysis.map.similarity import loudest

FDR = 0.05
"""Expected share of false units among those found; with nothing shared, the chance to find any."""
MIN_PRESENCE = 0.5
SHARES = (0.125, 0.25, 0.375, 0.5)
"""k as a share of the units: "among the loudest" ends at the louder half."""


@dataclass(frozen=True, eq=False)
class Universal:
    """Per unit how widely it is loud, and whether that can be chance.

    Attributes:
        tops: the k that were counted.
        counts: number of (layer, head) in which a unit is among the k loudest, ``[top, unit]``;
            ties share their places.
        expected: the count that chance gives.
        layer_counts: the same per layer, ``[top, layer, unit]``.
        best_top: for each unit the k at which it is most present.
        presence: chance-corrected presence at that k, at most 1.
        p_values: per null (``plain``, ``band``), ``[unit]``.
        q_values: the same after Benjamini and Hochberg.
        is_universal: per null.
        n_heads: living (layer, head).
        fdr, min_presence: the bounds that were set.
    """

    tops: tuple[int, ...]
    counts: Float[np.ndarray, "top unit"]
    expected: Float[np.ndarray, " top"]
    layer_counts: Float[np.ndarray, "top layer unit"]
    best_top: Int[np.ndarray, " unit"]
    presence: Float[np.ndarray, " unit"]
    p_values: dict[str, np.ndarray]
    q_values: dict[str, np.ndarray]
    is_universal: dict[str, np.ndarray]
    n_heads: int
    fdr: float = FDR
    min_presence: float = MIN_PRESENCE

    @property
    def beyond_chance(self) -> tuple[int, ...]:
        """Units that are loud in more places than chance gives, by however little."""
        return tuple(int(u) for u in np.flatnonzero(self.q_values["plain"] <= self.fdr))

    @property
    def units(self) -> tuple[int, ...]:
        """Units loud beyond chance and in most places."""
        return tuple(int(u) for u in np.flatnonzero(self.is_universal["plain"]))

    @property
    def units_beyond_frequency(self) -> tuple[int, ...] | None:
        """Those of them that also beat their neighbours in frequency; None without rotation."""
        if "band" not in self.is_universal:
            return None
        both = self.is_universal["plain"] & self.is_universal["band"]
        return tuple(int(u) for u in np.flatnonzero(both))

    def table(self) -> list[dict[str, Any]]:
        """One row per unit, the most present first."""
        n_units = self.counts.shape[1]
        rows = []
        for u in np.lexsort((np.arange(n_units), -self.presence)):
            k = int(self.best_top[u])
            at = self.tops.index(k)
            rows.append(
                {
                    "unit": int(u),
                    "universal": bool(self.is_universal["plain"][u]),
                    "top": k,
                    "heads": float(self.counts[at, u]),
                    "of": self.n_heads,
                    "chance": float(self.expected[at]),
                    "layers": int((self.layer_counts[at, :, u] > 0).sum()),
                    "presence": float(self.presence[u]),
                    **{f"p_{name}": float(p[u]) for name, p in self.p_values.items()},
                    **{f"q_{name}": float(q[u]) for name, q in self.q_values.items()},
                }
            )
        return rows


def universal_units(
    x: Float[np.ndarray, "layer head unit"],
    orders: dict[str, Orders],
    bands: Int[np.ndarray, " unit"] | None,
    fdr: float = FDR,
    min_presence: float = MIN_PRESENCE,
) -> Universal:
    """Count, compare with chance, and control the false-discovery rate over units.

    Args:
        x: gains per unit.
        orders: shuffles per null.
        bands: of the units.
        fdr, min_presence: see ``Universal``.
    """
    n_layers, n_heads, n_units = x.shape
    tops = top_sizes(n_units)
    flat = x.reshape(-1, n_units)
    marks = np.stack([loudest(flat, k) for k in tops])
    per_layer = marks.reshape(len(tops), n_layers, n_heads, n_units).sum(2)
    counts = per_layer.sum(1)
    living = int((flat > 0).any(1).sum())
    share = np.array(tops) / n_units
    p_values, q_values, passed = {}, {}, {}
    presence_at = (counts / living - share[:, None]) / (1 - share[:, None])
    best = presence_at.argmax(0)
    for name, drawn in orders.items():
        within = bands if name == "band" else None
        z, z_null = _evidence(per_layer, drawn, within)
        groups = np.zeros(n_units, dtype=np.int64) if within is None else within
        p_values[name] = _smallest_p(z, z_null, groups)
        q_values[name] = benjamini_hochberg(p_values[name])
    presence = presence_at[best, np.arange(n_units)]
    for name, q in q_values.items():
        passed[name] = (q <= fdr) & (presence >= min_presence)
    return Universal(
        tops=tops,
        counts=counts,
        expected=share * living,
        layer_counts=per_layer,
        best_top=np.array(tops)[best],
        presence=presence,
        p_values=p_values,
        q_values=q_values,
        is_universal=passed,
        n_heads=living,
        fdr=fdr,
        min_presence=min_presence,
    )


def top_sizes(n_units: int) -> tuple[int, ...]:
    """The k that are swept: shares of the units, at least 1 and below all of them."""
    return tuple(sorted({min(n_units - 1, max(1, round(s * n_units))) for s in SHARES}))


def _evidence(
    per_layer: Float[np.ndarray, "top layer unit"],
    orders: Orders,
    bands: Int[np.ndarray, " unit"] | None,
) -> tuple[Float[np.ndarray, "top unit"], Float[np.ndarray, "permutation top unit"]]:
    """z of every count, observed and shuffled."""
    n_units = per_layer.shape[-1]
    mean, variance = np.zeros((len(per_layer), n_units)), np.zeros((len(per_layer), n_units))
    for band in [slice(None)] if bands is None else [bands == b for b in np.unique(bands)]:
        part = per_layer[..., band]
        mean[:, band] = part.mean(-1).sum(1)[:, None]
        variance[:, band] = part.var(-1).sum(1)[:, None]
    width = np.sqrt(variance)
    usable = width > 1e-9

    def z(counts: np.ndarray) -> np.ndarray:
        return np.where(usable, (counts - mean) / np.where(usable, width, 1), 0.0)

    layers = np.arange(per_layer.shape[1])[None, :, None]
    null = []
    for chunk in in_chunks(orders):
        moved = np.stack([counts[layers, chunk].sum(1) for counts in per_layer], axis=1)
        null.append(z(moved))
    return z(per_layer.sum(1)), np.concatenate(null)


def _smallest_p(
    seen: Float[np.ndarray, "top unit"],
    null: Float[np.ndarray, "permutation top unit"],
    groups: Int[np.ndarray, " unit"],
) -> Float[np.ndarray, " unit"]:
    """p-value of each unit's smallest p over k; units of a group are exchangeable and pooled."""
    p = np.ones(seen.shape[1])
    for g in np.unique(groups):
        at = groups == g
        small = np.ones(int(at.sum()))
        small_null = np.ones(null[:, 0, at].shape)
        for k in range(len(seen)):
            pool = np.sort(null[:, k, at], axis=None)
            small = np.minimum(small, _share_reached(pool, seen[k, at]))
            small_null = np.minimum(small_null, _share_reached(pool, null[:, k, at]))
        pool = np.sort(-small_null, axis=None)
        p[at] = _share_reached(pool, -small)
    return p


def _share_reached(pool: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of a sorted pool, and of the value itself, at or above each value."""
    reached = len(pool) - np.searchsorted(pool, values - 1e-9)
    share: np.ndarray = (1 + reached) / (1 + len(pool))
    return share


def benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """q-values: the smallest false-discovery rate at which each test is called."""
    order = np.argsort(p)[::-1]
    n = len(p)
    scaled = p[order] * n / np.arange(n, 0, -1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return q
