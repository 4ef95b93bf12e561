"""The smooth profile of a layer's gains over rotary frequency, and the residuals.

Two layers whose slow pairs are loud agree without sharing anything, because they follow the same
curve. We therefore fit the log gains of every layer, and of every head, with their own cubic in log
frequency and test the residuals for sharing. Units that do not rotate get their own constant
instead of a curve, so without rotary embeddings only the mean is subtracted.

Residuals of a fit are not exchangeable: they are smaller where the fit is flexible, and those of
every layer are orthogonal to the same curves. A null that only shuffles them is too narrow (7%
instead of 1% false sharing at six pairs). The null here follows Freedman and Lane (1983): shuffle
the residuals, then fit and subtract the profile again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gainlens.analysis.map.nulls import Orders, in_chunks, shuffle
from gainlens.brief import brief

DEGREE = 3
FLOOR = 0.01
"""Gains below this share of the head's mean are raised to it. Otherwise the logarithm of zero, or
of rounding error, would dominate all other units."""


@dataclass(frozen=True, eq=False)
class FrequencyProfile:
    """The curves to subtract, for each layer.

    Attributes:
        designs: for each layer the curves as columns, ``[unit, curve]``; all zero for a unit that
            no layer uses.
        off: for each layer the projection that removes them, ``[layer, unit, unit]``.
        groups: units that may be shuffled among each other: 0 for units that rotate, 1 for units
            that do not, 2 for units that no layer uses.
        freedom: residual dimensions, in the layer with the fewest.
    """

    designs: tuple[np.ndarray, ...]
    off: Float[np.ndarray, "layer unit unit2"]
    groups: Int[np.ndarray, "layer unit"]
    freedom: int

    __repr__ = brief

    @property
    def rotates(self) -> bool:
        """Whether any unit has a frequency, so that more than a mean is subtracted."""
        return bool((self.groups == 0).any())

    @classmethod
    def of(
        cls, frequency: Float[np.ndarray, "layer unit"], used: Bool[np.ndarray, " unit"]
    ) -> FrequencyProfile:
        """The profile over each layer's own frequencies.

        Args:
            frequency: radians per token; 0 if a unit does not rotate.
            used: units that are loud anywhere; the others are excluded.
        """
        groups = np.where(used, np.where(frequency > 0, 0, 1), 2)
        designs = tuple(_design(f, g) for f, g in zip(frequency, groups, strict=True))
        off = np.stack([_projection(d, used) for d in designs])
        freedom = min(int(used.sum()) - d.shape[1] for d in designs)
        return cls(designs, off, groups, freedom)

    def residuals(
        self, logs: Float[np.ndarray, "layer *place unit"]
    ) -> Float[np.ndarray, "layer *place unit"]:
        """Log gains minus the profile; 1 means a factor of e above it."""
        rows = logs.reshape(len(logs), -1, logs.shape[-1])
        found: np.ndarray = np.matmul(rows, self.off).reshape(logs.shape)
        found[np.abs(found) < 1e-9] = 0
        return found

    def shuffled(
        self, residuals: Float[np.ndarray, "layer place unit"], orders: Orders
    ) -> Iterator[Float[np.ndarray, "permutation layer place unit"]]:
        """Residuals under the null, a few permutations at a time, float32."""
        off = self.off.astype(np.float32)
        size = max(1, min(100, 2_000_000 // residuals.size))
        for chunk in in_chunks(orders, size):
            yield np.matmul(shuffle(residuals, chunk), off)

    def excess(
        self, logs: Float[np.ndarray, "layer place unit"], named: Sequence[int]
    ) -> Float[np.ndarray, " unit"]:
        """Mean over layers of the log gain above a profile fitted without the ``named`` units.

        Loud units pull the curve up, so their quiet neighbours appear quieter than they are, or
        louder on the far side of a bend. If too few units are left for a fit, all are used.
        """
        left = np.ones(logs.shape[-1], dtype=bool)
        left[list(named)] = False
        rows = []
        for log, design, groups in zip(logs, self.designs, self.groups, strict=True):
            keep = left & (groups < 2)
            enough = keep.sum() >= 2 * design.shape[1] and design[keep].any(0).all()
            at = keep if enough else groups < 2
            curve = np.linalg.lstsq(design[at], log[:, at].T, rcond=None)[0]
            above = (log - (design @ curve).T)[log.any(1)]
            if len(above):
                rows.append(np.where(groups < 2, above.mean(0), 0.0))
        mean: np.ndarray = np.mean(rows, axis=0) if rows else np.zeros(len(left))
        return mean


def log_gains(x: Float[np.ndarray, "*row unit"]) -> Float[np.ndarray, "*row unit"]:
    """Log of each gain over the mean of its row, floored at ``FLOOR``; zero rows stay zero."""
    mean = x.mean(-1, keepdims=True)
    relative = np.divide(x, mean, out=np.ones_like(x), where=mean > 0)
    found: np.ndarray = np.log(np.maximum(relative, FLOOR))
    return found


def _design(
    frequency: Float[np.ndarray, " unit"], groups: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "unit curve"]:
    columns = []
    rotating, level = groups == 0, groups == 1
    if rotating.any():
        z = np.log(frequency[rotating])
        width = np.ptp(z)
        z = 2 * (z - z.min()) / width - 1 if width > 0 else np.zeros_like(z)
        degree = min(DEGREE, len(np.unique(z.round(9))) - 1)
        part = np.zeros((len(frequency), degree + 1))
        part[rotating] = np.polynomial.legendre.legvander(z, degree)
        columns.append(part)
    if level.any():
        columns.append(level[:, None].astype(np.float64))
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(frequency), 0))


def _projection(
    design: Float[np.ndarray, "unit curve"], used: Bool[np.ndarray, " unit"]
) -> Float[np.ndarray, "unit unit2"]:
    q = np.linalg.qr(design)[0]
    found: np.ndarray = np.diag(used.astype(np.float64)) - q @ q.T
    return found
