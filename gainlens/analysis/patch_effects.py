"""``PatchEffects``: the effect of patching each key unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed


@dataclass(frozen=True, eq=False)
class PatchEffects(Displayed):
    """The effect of patching each unit.

    Attributes:
        effect: metric of the patched run minus that of the corrupted run, in the metric's units,
            ``[layer, kv_head, unit]``; NaN in layers that were not requested.
        clean, corrupted: the metric on each prompt.
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
            InputError: the metric is the same on both prompts, or unknown on the clean one.
        """
        if not np.isfinite(self.clean):
            raise InputError(
                "clean was given as a KeyCache, so its metric is unknown; pass tokens instead"
            )
        if self.clean == self.corrupted:
            raise InputError(f"metric is {self.clean!r} on both prompts, so shares are undefined")
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
        """Pearson correlation with the effects of another method, over the units of both.

        Raises:
            InputError: the shapes differ, or the effects do not vary.
        """
        if self.effect.shape != other.effect.shape:
            raise InputError(
                f"effects have shapes {self.effect.shape} and {other.effect.shape}: expected equal"
            )
        both = np.isfinite(self.effect) & np.isfinite(other.effect)
        a, b = self.effect[both], other.effect[both]
        if len(a) < 2 or a.std() == 0 or b.std() == 0:
            raise InputError("effects do not vary, so their correlation is undefined")
        return float(np.corrcoef(a, b)[0, 1])

    def to_dataframe(self) -> Any:
        """One row per unit: layer, kv_head, dim (the first of a pair), effect in metric units.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(
            {"layer": layer, "kv_head": head, "dim": self.dims[unit], "effect": float(value)}
            for (layer, head, unit), value in np.ndenumerate(self.effect)
        )

    def plot(self, ax: Any = None) -> Any:
        """Heat map, layers and heads × units; returns the axes without showing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.
        """
        from gainlens.plots.curves import plot_patching

        return plot_patching(self, ax)

    def _display(self) -> Display:
        from gainlens.plots.markup.results import patching_map

        return Display(
            f"Heat map of the change of the metric when the key {self.unit} of the clean run is "
            "put into the corrupted run, by layer and key head.",
            lambda alt: patching_map(self, alt),
        )
