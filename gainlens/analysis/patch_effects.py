"""``PatchEffects``: what patching each key unit changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.frames import data_frame


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """What patching each unit changes.

    Attributes:
        effect: metric of the patched run minus that of the corrupted run, in the metric's units,
            ``[layer, kv_head, unit]``; NaN in layers that were not asked for.
        clean, corrupted: the metric on either prompt.
        dims: the dimension (for a pair: the first of the two) behind each unit.
        unit: ``pair`` or ``dim``.
        method: ``exact`` or ``attribution``.
    """

    effect: Float[np.ndarray, "layer kv_head unit"]
    clean: float
    corrupted: float
    dims: tuple[int, ...]
    unit: str
    method: str

    def __repr__(self) -> str:
        layer, head, unit = self.largest(1)[0][:3]
        return (
            f"PatchEffects({self.method}, {self.effect.shape}, metric clean {self.clean:.4g}, "
            f"corrupted {self.corrupted:.4g}, largest at layer {layer}, head {head}, {self.unit} "
            f"of dim {unit})"
        )

    @property
    def normalised(self) -> Float[np.ndarray, "layer kv_head unit"]:
        """Share of the gap between corrupted (0) and clean (1) that each unit restores.

        Raises:
            InputError: the metric is the same on both prompts, or not known on the clean one.
        """
        if not np.isfinite(self.clean):
            raise InputError(
                "clean was given as a KeyCache, so its metric is not known: give tokens"
            )
        if self.clean == self.corrupted:
            raise InputError(
                f"metric is {self.clean!r} on both prompts: there is no gap to take a share of"
            )
        share: Float[np.ndarray, "layer kv_head unit"] = self.effect / (self.clean - self.corrupted)
        return share

    def largest(self, n: int = 10) -> list[tuple[int, int, int, float]]:
        """The ``n`` units with the largest absolute effect: (layer, kv_head, dim, effect)."""
        flat = np.abs(np.nan_to_num(self.effect)).ravel()
        rows = []
        for index in np.argsort(-flat, kind="stable")[:n]:
            layer, head, unit = np.unravel_index(index, self.effect.shape)
            value = float(self.effect[layer, head, unit])
            rows.append((int(layer), int(head), self.dims[unit], value))
        return rows

    def correlation(self, other: PatchEffects) -> float:
        """Pearson's correlation with the effects of another method, over units that both have.

        Raises:
            InputError: they have other shapes or nothing varies.
        """
        if self.effect.shape != other.effect.shape:
            raise InputError(
                f"effects have shapes {self.effect.shape} and {other.effect.shape}: expected one"
            )
        both = np.isfinite(self.effect) & np.isfinite(other.effect)
        a, b = self.effect[both], other.effect[both]
        if len(a) < 2 or a.std() == 0 or b.std() == 0:
            raise InputError("effects do not vary, so they have no correlation")
        return float(np.corrcoef(a, b)[0, 1])

    def to_dataframe(self) -> Any:
        """One row per unit: layer, kv_head, dim (a pair's first), effect in the metric's units.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(
            {"layer": layer, "kv_head": head, "dim": self.dims[unit], "effect": float(value)}
            for (layer, head, unit), value in np.ndenumerate(self.effect)
        )

    def plot(self, ax: Any = None) -> Any:
        """A heat map, layers and heads down, units across; returns the axes, shows nothing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.
        """
        from gainlens.plots.curves import plot_patching

        return plot_patching(self, ax)

    def _repr_html_(self) -> str:
        from gainlens.plots.notebook import figure_html

        return figure_html(
            self,
            f"Heat map of the change of the metric when the key {self.unit} of the clean run is "
            "put into the corrupted run, by layer and key head.",
        )
