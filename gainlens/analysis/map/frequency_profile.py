"""The smooth profile of a layer's gains over rotary frequency, and what is left without it.

Two layers whose slow pairs are loud agree without sharing anything: they follow the same curve. So
the log gains of every layer, and of every head, are fitted by a cubic in log frequency of their
own; sharing is looked for in the residuals. Units that do not rotate have a level of their own in
place of a curve, so without rotary embeddings only the mean is taken off.

Residuals of a fit are no longer exchangeable: they are smaller where the fit bends easily, and
every layer's are orthogonal to the same curves. A null that merely shuffles them is too narrow (7%
instead of 1% false sharing at six pairs). The null here follows Freedman and Lane (1983): shuffle
the residuals, then take the profile off again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gainlens.analysis.map.nulls import Orders, in_chunks, shuffle

DEGREE = 3
FLOOR = 0.01
"""A unit below this share of its head's mean gain counts as this quiet: a logarithm of zero, or of
rounding, would outweigh all other units."""


@dataclass(frozen=True, eq=False)
class FrequencyProfile:
    """The curves that are taken off, layer by layer.

    Attributes:
        designs: for each layer the curves as columns, ``[unit, curve]``; all zero for a unit that
            no layer uses.
        off: for each layer the projection that takes them off, ``[layer, unit, unit]``.
        groups: which units may take each other's place in a shuffle: 0 those that rotate, 1 those
            that do not, 2 those that no layer uses.
        freedom: dimensions that are left in the layer with the fewest.
    """

    designs: tuple[np.ndarray, ...]
    off: Float[np.ndarray, "layer unit unit2"]
    groups: Int[np.ndarray, "layer unit"]
    freedom: int

    @property
    def rotates(self) -> bool:
        """Whether any unit has a frequency, so that there is more than a mean to take off."""
        return bool((self.groups == 0).any())

    @classmethod
    def of(
        cls, frequency: Float[np.ndarray, "layer unit"], used: Bool[np.ndarray, " unit"]
    ) -> FrequencyProfile:
        """The profile over each layer's own frequencies.

        Args:
            frequency: radians per token; 0 where a unit does not rotate.
            used: units that are loud anywhere; the others take no part.
        """
        groups = np.where(used, np.where(frequency > 0, 0, 1), 2)
        designs = tuple(_design(f, g) for f, g in zip(frequency, groups, strict=True))
        off = np.stack([_projection(d, used) for d in designs])
        freedom = min(int(used.sum()) - d.shape[1] for d in designs)
        return cls(designs, off, groups, freedom)

    def residuals(
        self, logs: Float[np.ndarray, "layer *place unit"]
    ) -> Float[np.ndarray, "layer *place unit"]:
        """Log gains less the profile; 1 is a factor of e above it."""
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
        """Mean over layers of the log gain above a profile fitted without the units named.

        Loud units pull the curve up, and their quiet neighbours seem quieter or, on the far side
        of a bend, louder than they are. Where too few units are left for a fit, all are used.
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
    """Log of each gain over its row's mean, not below ``FLOOR``; a row of zeros stays zero."""
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
