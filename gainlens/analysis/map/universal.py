"""Universal units: units that are among the loudest in more layers than expected by chance.

Gains are taken relative to each layer's own profile over frequency (``frequency_profile``), so a
unit is loud if it stands out from its neighbours in frequency. For every k, we count the places
(layers, or heads of layers) in which a unit is among the k loudest. The number of loud units is not
known in advance, and if k is smaller than the number of shared units, they compete for places. So
no single k is enough: the evidence for a unit is its smallest p-value over k, and the shuffles use
the same minimum.

A unit is *universal* if three conditions hold:

- Its p-value passes the procedure of Benjamini and Hochberg (1995) over all units.
- Its presence is at least ``min_presence``. Presence is the largest value over k of
  (share of places - k/n) / (1 - k/n): 0 at chance level, 1 for a unit that is loud everywhere. With
  enough layers, even a tiny effect is significant.
- It is louder than its neighbours by ``MIN_EXCESS``. Loud units bend the profile, so quiet ones can
  appear loud next to it; they are excluded by fitting the profile without the loud ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control

from gainlens.analysis.map.frequency_profile import FrequencyProfile
from gainlens.brief import brief

FDR = 0.05
"""Expected share of false discoveries; with nothing shared, the probability of finding any unit."""
MIN_PRESENCE = 0.5
MIN_EXCESS = 1.2
"""As a multiple of the profile of the units that are not universal."""
SHARES = (0.125, 0.25, 0.375, 0.5)
"""k as a share of the units; "among the loudest" means the louder half at most."""


@dataclass(frozen=True, eq=False)
class Universal:
    """In how many places each unit is loud, and whether that can be chance.

    Attributes:
        tops: the values of k.
        counts: number of places in which a unit is among the k loudest, ``[top, unit]``; ties
            share their places.
        expected: the count expected by chance.
        layer_counts: the same per layer, ``[top, layer, unit]``.
        best_top: for each unit the k with the largest presence.
        presence: chance-corrected presence at that k, at most 1.
        excess: gain of a unit divided by the profile of the units that are not universal.
        p_values: ``[unit]``; 1 for a unit that no layer uses.
        q_values: p-values adjusted by Benjamini and Hochberg.
        is_universal: ``[unit]``.
        n_places: living layers, or heads of layers.
        fdr, min_presence: the thresholds used.
    """

    tops: tuple[int, ...]
    counts: Float[np.ndarray, "top unit"]
    expected: Float[np.ndarray, " top"]
    layer_counts: Float[np.ndarray, "top layer unit"]
    best_top: Int[np.ndarray, " unit"]
    presence: Float[np.ndarray, " unit"]
    excess: Float[np.ndarray, " unit"]
    p_values: Float[np.ndarray, " unit"]
    q_values: Float[np.ndarray, " unit"]
    is_universal: Bool[np.ndarray, " unit"]
    n_places: int
    fdr: float = FDR
    min_presence: float = MIN_PRESENCE

    __repr__ = brief

    @property
    def beyond_chance(self) -> tuple[int, ...]:
        """Units loud in significantly more places than by chance, whatever the effect size."""
        return tuple(int(u) for u in np.flatnonzero(self.q_values <= self.fdr))

    @property
    def units(self) -> tuple[int, ...]:
        """Units that are loud beyond chance, in most places, and by a margin."""
        return tuple(int(u) for u in np.flatnonzero(self.is_universal))

    def table(self) -> list[dict[str, Any]]:
        """One row per unit, by decreasing presence."""
        n_units = self.counts.shape[1]
        rows = []
        for u in np.lexsort((np.arange(n_units), -self.presence)):
            k = int(self.best_top[u])
            at = self.tops.index(k)
            rows.append(
                {
                    "unit": int(u),
                    "universal": bool(self.is_universal[u]),
                    "top": k,
                    "places": float(self.counts[at, u]),
                    "of": self.n_places,
                    "chance": float(self.expected[at]),
                    "layers": int((self.layer_counts[at, :, u] > 0).sum()),
                    "presence": float(self.presence[u]),
                    "excess": float(self.excess[u]),
                    "p": float(self.p_values[u]),
                    "q": float(self.q_values[u]),
                }
            )
        return rows


def universal_units(
    logs: Float[np.ndarray, "layer place unit"],
    profile: FrequencyProfile,
    null: Iterable[Float[np.ndarray, "permutation layer place unit"]],
    fdr: float = FDR,
    min_presence: float = MIN_PRESENCE,
) -> Universal:
    """Count, compare with chance, and control the false-discovery rate over units.

    Args:
        logs: log gains; a place whose logs are all zero is dead.
        profile: the frequency profile to subtract.
        null: residuals under the null, from ``profile.shuffled``.
        fdr, min_presence: see ``Universal``.
    """
    n_units = logs.shape[-1]
    used = np.flatnonzero((profile.groups < 2).any(0))
    n = len(used)
    tops = top_sizes(n)
    # A fit leaves smaller residuals where it is flexible: at the ends of the frequency range.
    spread = np.sqrt(np.clip(np.diagonal(profile.off, axis1=1, axis2=2), 1e-6, None))[:, None]
    level = 1.0 / spread[..., used]
    residuals = profile.residuals(logs)
    living = residuals.any(-1)
    per_layer = _marks(residuals[..., used] * level, tops).sum(2, dtype=np.float64)
    counts = per_layer.sum(1)
    share = np.array(tops) / n
    presence_at = (counts / max(1, int(living.sum())) - share[:, None]) / (1 - share[:, None])
    best = presence_at.argmax(0)
    presence = presence_at[best, np.arange(n)]
    shuffled = np.concatenate([_marks(m[..., used] * level, tops).sum((2, 3)) for m in null], 1)
    shuffled = shuffled.astype(np.float64)
    p = _smallest_p(*_evidence(counts, shuffled))
    q = false_discovery_control(p)
    called = (q <= fdr) & (presence >= min_presence)
    excess = profile.excess(logs, used[called].tolist())[used]
    called &= excess >= np.log(MIN_EXCESS)

    def full(values: np.ndarray, rest: float) -> np.ndarray:
        found = np.full((*values.shape[:-1], n_units), rest, dtype=values.dtype)
        found[..., used] = values
        return found

    return Universal(
        tops=tops,
        counts=full(counts, 0),
        expected=share * living.sum(),
        layer_counts=full(per_layer, 0),
        best_top=full(np.array(tops)[best], tops[-1]),
        presence=full(presence, 0),
        excess=full(np.exp(excess), 1),
        p_values=full(p, 1),
        q_values=full(q, 1),
        is_universal=full(called, False),
        n_places=int(living.sum()),
        fdr=fdr,
        min_presence=min_presence,
    )


def top_sizes(n_units: int) -> tuple[int, ...]:
    """The values of k: shares of the units, at least 1 and less than all of them."""
    return tuple(sorted({max(1, min(n_units - 1, round(s * n_units))) for s in SHARES}))


def _marks(
    residuals: Float[np.ndarray, "*row unit"], tops: tuple[int, ...]
) -> Float[np.ndarray, "top *row unit"]:
    """1 if a unit is among the k loudest of its row, with ties shared; 0 in a row of zeros."""
    rows = residuals.astype(np.float32).reshape(-1, residuals.shape[-1])
    ranked = -np.partition(-rows, [k - 1 for k in tops], axis=-1)
    slack = np.float32(1e-6) * np.abs(rows).max(-1, keepdims=True)
    found = np.empty((len(tops), *rows.shape), dtype=np.float32)
    for marks, k in zip(found, tops, strict=True):
        bar = ranked[:, k - 1 : k]
        above, reached = rows > bar + slack, rows >= bar - slack
        inside = above.sum(-1, keepdims=True)
        at_bar = reached.sum(-1, keepdims=True) - inside
        marks[:] = above
        marks += (reached ^ above) * ((k - inside) / at_bar).astype(np.float32)
    found[:, slack[:, 0] < 1e-15] = 0
    return found.reshape(len(tops), *residuals.shape)


def _evidence(
    counts: Float[np.ndarray, "top unit"], shuffled: Float[np.ndarray, "top permutation unit"]
) -> tuple[Float[np.ndarray, "top unit"], Float[np.ndarray, "top permutation unit"]]:
    """z-scores of all counts, observed and shuffled."""
    mean, width = shuffled.mean(1, keepdims=True), shuffled.std(1, keepdims=True)
    usable = width > 1e-9
    scale = np.where(usable, width, 1.0)
    seen = np.where(usable[:, 0], (counts - mean[:, 0]) / scale[:, 0], 0.0)
    return seen, np.where(usable, (shuffled - mean) / scale, 0.0)


def _smallest_p(
    seen: Float[np.ndarray, "top unit"], null: Float[np.ndarray, "top permutation unit"]
) -> Float[np.ndarray, " unit"]:
    """p-value of each unit's smallest p over k; the z of all units are pooled."""
    small, small_null = np.ones(seen.shape[1]), np.ones(null.shape[1:])
    for z, z_null in zip(seen, null, strict=True):
        pool = np.sort(z_null, axis=None)
        small = np.minimum(small, _share_reached(pool, z))
        small_null = np.minimum(small_null, _share_reached(pool, z_null))
    return _share_reached(np.sort(-small_null, axis=None), -small)


def _share_reached(pool: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of a sorted pool, with the value itself included, at or above each value."""
    reached = len(pool) - np.searchsorted(pool, values - 1e-9)
    share: np.ndarray = (1 + reached) / (1 + len(pool))
    return share
