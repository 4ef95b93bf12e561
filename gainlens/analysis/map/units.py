"""The units of a map: rotary pairs if the model rotates its keys, else single dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.analysis.map.canonical import CanonicalGains
from gainlens.brief import brief
from gainlens.errors import InputError
from gainlens.probes.gains import UNITS, KeyGains

Gains = KeyGains | CanonicalGains | torch.Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Units:
    """The meaning of the columns of a map.

    Attributes:
        kind: ``pair``, ``dim`` or, in a canonical basis, ``singular direction``.
        dims: the key dimensions of each unit.
        layer_frequency: radians per token of each unit in each layer, ``[layer, unit]``; 0 if
            it does not rotate.
    """

    kind: str
    dims: tuple[tuple[int, ...], ...]
    layer_frequency: Float[np.ndarray, "layer unit"]

    __repr__ = brief

    def __len__(self) -> int:
        return len(self.dims)

    @property
    def frequency(self) -> Float[np.ndarray, " unit"]:
        """Radians per token of each unit; the mean over layers if they differ."""
        mean: Float[np.ndarray, " unit"] = self.layer_frequency.mean(0)
        return mean

    @property
    def wavelength(self) -> list[float | None]:
        """Tokens per turn of each unit; None if it does not rotate or differs between layers.

        See ``layer_frequency`` for models with several rotary bases.
        """
        first = self.layer_frequency[0]
        alike = np.isclose(self.layer_frequency, first, rtol=1e-3, atol=0).all(0)
        return [
            2 * np.pi / float(f) if f > 0 and same else None
            for f, same in zip(first, alike, strict=True)
        ]

    def wavelengths(self, layer: int) -> list[float | None]:
        """Tokens per turn of each unit in one layer; None if it does not rotate."""
        return [2 * np.pi / float(f) if f > 0 else None for f in self.layer_frequency[layer]]

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
        }


def unit_gains(
    gains: Gains,
    score: str,
    stage: str,
    unit: str | None = None,
    frequency: Sequence[float] | Sequence[Sequence[float]] | np.ndarray | None = None,
) -> tuple[Float[np.ndarray, "layer kv_head unit"], Units]:
    """Gains per unit, float64, and the units.

    Args:
        gains: ``KeyGains``, ``CanonicalGains`` or a non-negative array ``[layer, kv_head, unit]``.
        score, stage: which gains of ``KeyGains`` to use; ignored for an array.
        unit: ``pair`` or ``dim``; by default pairs if the model rotates its keys. Rotating the
            two dimensions of a pair into each other, in both W_Q and W_K, changes no logit, so
            only the pair is comparable between heads.
        frequency: for an array, radians per token of its units, ``[unit]`` or ``[layer, unit]``.

    Raises:
        InputError: a wrong number of axes, NaN, negative values, or an unknown unit.
    """
    if unit is not None and unit not in UNITS:
        raise InputError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if isinstance(gains, KeyGains):
        return _of_key_gains(gains, score, stage, unit)
    if isinstance(gains, CanonicalGains):
        x = gains.score(score).double().numpy()
        n = x.shape[-1]
        dims = tuple((i,) for i in range(n))
        return _checked(x), Units("singular direction", dims, np.zeros((len(x), n)))
    x = np.asarray(
        gains.detach().cpu().double() if isinstance(gains, torch.Tensor) else gains,
        dtype=np.float64,
    )
    x = _checked(x)
    layers, n = len(x), x.shape[-1]
    f = np.zeros(n) if frequency is None else np.asarray(frequency, dtype=np.float64)
    if f.shape not in ((n,), (layers, n)) or not np.isfinite(f).all() or (f < 0).any():
        raise InputError(
            f"frequency has shape {f.shape}: expected {n} numbers of 0 or above, one per unit, or "
            f"{layers} rows of them, one per layer"
        )
    return x, Units("dim", tuple((i,) for i in range(n)), np.broadcast_to(f, (layers, n)).copy())


def _of_key_gains(
    gains: KeyGains, score: str, stage: str, unit: str | None
) -> tuple[Float[np.ndarray, "layer kv_head unit"], Units]:
    card = gains.model
    kind = unit or ("pair" if card.rotary_dim else "dim")
    partner = card.partner.numpy()
    own = np.arange(card.d_head)
    values = gains.score(score, stage=stage, unit=kind).double().numpy()  # type: ignore[arg-type]
    frequency = np.zeros((card.n_layers, card.d_head))
    if card.rotary_dim:
        per_pair = gains.frequencies.double().numpy()
        lower = own[own < partner]
        frequency[:, lower] = frequency[:, partner[lower]] = per_pair[:, : len(lower)]
    if kind == "dim":
        singles = tuple((int(i),) for i in own)
        return _checked(values), Units("dim", singles, frequency)
    first = own[own <= partner]
    dims: tuple[tuple[int, ...], ...] = tuple(
        (int(i),) if partner[i] == i else (int(i), int(partner[i])) for i in first
    )
    return _checked(values[..., first]), Units("pair", dims, frequency[:, first])


def _checked(x: np.ndarray) -> Float[np.ndarray, "layer kv_head unit"]:
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"gains have shape {x.shape}: expected [layer, kv_head, d_head]")
    if len(x) < 2:
        raise InputError("gains have only one layer: a map compares layers, expected two or more")
    if x.shape[-1] < 2:
        raise InputError("gains have only one unit per head: expected two or more")
    if not np.isfinite(x).all():
        layer = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise InputError(f"gains contain NaN or infinity, first in layer {layer}")
    if (x < 0).any():
        raise InputError("gains contain negative values: expected gains of zero or above")
    return x


def layer_profiles(
    x: Float[np.ndarray, "layer kv_head unit"],
) -> Float[np.ndarray, "layer unit"]:
    """Mean over living heads, each scaled to mean 1; an all-zero layer stays zero."""
    mean = x.mean(-1, keepdims=True)
    scaled = np.divide(x, mean, out=np.zeros_like(x), where=mean > 0)
    living = (mean[..., 0] > 0).sum(1, keepdims=True)
    profiles: Float[np.ndarray, "layer unit"] = scaled.sum(1) / np.maximum(living, 1)
    return profiles


def source_facts(gains: Gains, score: str, stage: str) -> dict[str, Any]:
    """The origin of the gains, and what makes index i comparable between heads."""
    if isinstance(gains, KeyGains):
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
