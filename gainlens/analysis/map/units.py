"""The units of a map: rotary pairs where there is a rotation, else single dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.analysis.map.canonical import CanonicalGains
from gainlens.errors import InputError
from gainlens.probes.gains import UNITS, KeyGains

BAND_SIZE = 4
"""Neighbouring frequencies per band: few enough to follow the rotary profile closely, enough that a
shuffle inside a band (4! orders per layer) still moves something."""

SAME_FREQUENCY = 1e-3
"""Relative difference of two measured frequencies that counts as none."""

Gains = KeyGains | CanonicalGains | torch.Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Units:
    """What one column of a map stands for.

    Attributes:
        kind: ``pair``, ``dim`` or, in a canonical basis, ``singular direction``.
        dims: the key dimensions of each unit.
        frequency: radians per token of each unit, ``[unit]``; 0 where it does not rotate. Where
            layers rotate differently, that of the first layer that rotates it; ``by_layer`` has
            all.
        bands: frequency band of each unit, ``[unit]``, or None where nothing rotates and so no
            frequency profile exists.
        by_layer: radians per token, ``[layer, unit]``, where layers rotate differently.
    """

    kind: str
    dims: tuple[tuple[int, ...], ...]
    frequency: Float[np.ndarray, " unit"]
    bands: Int[np.ndarray, " unit"] | None
    by_layer: Float[np.ndarray, "layer unit"] | None = None

    def __len__(self) -> int:
        return len(self.dims)

    @property
    def wavelength(self) -> list[float | None]:
        """Tokens per turn of each unit; None where it does not rotate, or layers differ."""
        same = np.ones(len(self), dtype=bool)
        if self.by_layer is not None:
            same = np.isclose(self.by_layer, self.frequency, rtol=SAME_FREQUENCY).all(0)
        return [
            2 * np.pi / float(f) if f > 0 and one else None
            for f, one in zip(self.frequency, same, strict=True)
        ]

    def wavelengths(self, layer: int) -> list[float | None]:
        """Tokens per turn of each unit in one layer; None where it does not rotate there."""
        return [2 * np.pi / f if f > 0 else None for f in self.frequencies(layer)]

    def frequencies(self, layer: int) -> list[float]:
        """Radians per token of each unit in one layer."""
        row = self.frequency if self.by_layer is None else self.by_layer[layer]
        return [float(f) for f in row]

    def label(self, unit: int) -> str:
        """A name for tables and axes, e.g. ``pair 3 (dims 3, 35)``."""
        dims = self.dims[unit]
        return f"{self.kind} {unit}" + (
            f" (dims {', '.join(map(str, dims))})" if len(dims) > 1 else ""
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind,
            "dims": [list(d) for d in self.dims],
            "frequency": self.frequency.tolist(),
            "bands": None if self.bands is None else self.bands.tolist(),
            "frequency_by_layer": None if self.by_layer is None else self.by_layer.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Units:
        """What ``to_json`` gave."""
        bands = data["bands"]
        return cls(
            data["kind"],
            tuple(tuple(int(i) for i in d) for d in data["dims"]),
            np.array(data["frequency"], dtype=np.float64),
            None if bands is None else np.array(bands, dtype=np.int64),
            None
            if data.get("frequency_by_layer") is None
            else np.array(data["frequency_by_layer"], dtype=np.float64),
        )


def frequency_bands(
    frequency: Float[np.ndarray, " unit"], size: int = BAND_SIZE
) -> Int[np.ndarray, " unit"] | None:
    """Group units of neighbouring frequency; units that do not rotate form bands of their own.

    Rotary frequencies form a geometric series, so bands of equal size are of equal width in log
    frequency. Dimensions of one pair share a frequency and so a band.

    Returns:
        Band numbers, or None where no unit rotates.
    """
    if not (frequency > 0).any():
        return None
    distinct = np.unique(frequency[frequency > 0])[::-1]
    n_bands = max(1, len(distinct) // size)
    band_of = {f: min(i // size, n_bands - 1) for i, f in enumerate(distinct)}
    return np.array([band_of.get(f, n_bands) for f in frequency], dtype=np.int64)


def unit_gains(
    gains: Gains,
    score: str,
    stage: str,
    unit: str | None = None,
    frequency: Sequence[float] | np.ndarray | None = None,
) -> tuple[Float[np.ndarray, "layer kv_head unit"], Units]:
    """Gains per unit, float64, and what the units are.

    Args:
        gains: ``KeyGains``, ``CanonicalGains`` or a non-negative array ``[layer, kv_head, unit]``.
        score, stage: of ``KeyGains``; ignored for an array.
        unit: ``pair`` or ``dim``; by default pairs where the model rotates. Turning the two
            dimensions of a pair into each other, in W_Q and W_K alike, changes no logit, so only
            the pair means the same thing in two heads.
        frequency: for an array, radians per token of its units, for the band-preserving null.

    Raises:
        InputError: another number of axes, NaN, negative values, an unknown unit.
    """
    if unit is not None and unit not in UNITS:
        raise InputError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if isinstance(gains, KeyGains):
        return _of_key_gains(gains, score, stage, unit)
    if isinstance(gains, CanonicalGains):
        x = gains.score(score).double().numpy()
        n = x.shape[-1]
        dims = tuple((i,) for i in range(n))
        return _checked(x), Units("singular direction", dims, np.zeros(n), None)
    x = np.asarray(
        gains.detach().cpu().double() if isinstance(gains, torch.Tensor) else gains,
        dtype=np.float64,
    )
    x = _checked(x)
    n = x.shape[-1]
    f = np.zeros(n) if frequency is None else np.asarray(frequency, dtype=np.float64)
    if f.shape != (n,) or not np.isfinite(f).all() or (f < 0).any():
        raise InputError(
            f"frequency has shape {f.shape}: expected {n} numbers of 0 or above, one per unit"
        )
    return x, Units("dim", tuple((i,) for i in range(n)), f, frequency_bands(f))


def _of_key_gains(
    gains: KeyGains, score: str, stage: str, unit: str | None
) -> tuple[Float[np.ndarray, "layer kv_head unit"], Units]:
    card = gains.model
    kind = unit or ("pair" if card.rotary_dim else "dim")
    partner = card.partner.numpy()
    own = np.arange(card.d_head)
    values = gains.score(score, stage=stage, unit=kind).double().numpy()  # type: ignore[arg-type]
    lower = own[own < partner]
    every = np.zeros((len(gains.frequencies), card.d_head))
    every[:, lower] = every[:, partner[lower]] = gains.frequencies.double().numpy()[:, : len(lower)]
    # An average over layers of two rotary bases would be the frequency of none.
    turning = (every > 0).argmax(0)
    frequency = every[turning, own]
    by_layer = None if np.allclose(every, frequency, rtol=SAME_FREQUENCY, atol=0) else every
    if kind == "dim":
        singles = tuple((int(i),) for i in own)
        return _checked(values), Units(
            "dim", singles, frequency, frequency_bands(frequency), by_layer
        )
    first = own[own <= partner]
    dims: tuple[tuple[int, ...], ...] = tuple(
        (int(i),) if partner[i] == i else (int(i), int(partner[i])) for i in first
    )
    frequency = frequency[first]
    by_layer = None if by_layer is None else by_layer[:, first]
    return _checked(values[..., first]), Units(
        "pair", dims, frequency, frequency_bands(frequency), by_layer
    )


def _checked(x: np.ndarray) -> Float[np.ndarray, "layer kv_head unit"]:
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"gains have shape {x.shape}: expected [layer, kv_head, d_head]")
    if len(x) < 2:
        raise InputError("gains have one layer only: a map compares layers, expected two or more")
    if x.shape[-1] < 2:
        raise InputError("gains have one unit per head only: expected two or more")
    if not np.isfinite(x).all():
        layer = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise InputError(f"gains hold NaN or infinity, first in layer {layer}")
    if (x < 0).any():
        raise InputError("gains hold negative values: expected gains of zero or above")
    return x
