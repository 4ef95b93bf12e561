"""Display of a choice of key dimensions: shared by masks, plans and refitted cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed

if TYPE_CHECKING:
    import torch


class Kept(Displayed):
    """Table and figure for any object with ``keep``, boolean ``[layer, kv_head, d_head]``."""

    if TYPE_CHECKING:

        @property
        def keep(self) -> torch.Tensor:
            """True for what stays."""

    def to_dataframe(self) -> Any:
        """One row per key head: layer, kv_head, kept (how many), share (0 to 1), dims (a list).

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer,
                "kv_head": head,
                "kept": int(row.sum()),
                "share": float(row.float().mean()),
                "dims": row.nonzero().flatten().tolist(),
            }
            for layer, heads in enumerate(self.keep)
            for head, row in enumerate(heads)
        ]

    def plot(self, ax: Any = None) -> Any:
        """Heat map of what stays, layers × dimensions; returns the matplotlib axes without showing.

        Args:
            ax: axes to draw into; new ones by default.
        """
        from gainlens.plots.basics import plot_kept

        return plot_kept(self.keep.numpy(), ax)

    def _display(self) -> Display:
        from gainlens.plots.markup.results import kept_map

        return Display(
            "Heat map of the share of key heads that keep each key dimension, by layer: "
            f"{float(self.keep.float().mean()):.1%} of all stay.",
            lambda alt: kept_map(self.keep.numpy(), alt),
        )
