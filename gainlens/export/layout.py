"""Where the kept dimensions of a layer's heads go: slots of a thin head.

Where keys rotate, a thin head is a row of slot pairs (s, s + width/2), however the full head pairs
its dimensions. A kept rotary pair fills one slot pair and brings its frequency. Kept dimensions
that don't rotate fill slot pairs of frequency zero, two by two. Heads with fewer slots than the
widest are padded with empty ones, whose rows are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int

from gainlens.errors import InputError
from gainlens.model.families import Pairing
from gainlens.model.sites import pair_partners


@dataclass(frozen=True)
class KeyPairs:
    """Which dimensions of a key head rotate together.

    Attributes:
        rotary_dim: how many leading dimensions rotate; 0 if none does.
        pairing: ``half`` (i with i + rotary_dim/2) or ``adjacent`` (2i with 2i + 1).
        still: layers in which nothing rotates.
    """

    rotary_dim: int
    pairing: Pairing = "half"
    still: frozenset[int] = frozenset()

    @classmethod
    def of(cls, value: int | KeyPairs) -> KeyPairs:
        """``value`` itself, or half-split pairs of so many dimensions in every layer."""
        return value if isinstance(value, KeyPairs) else cls(value)

    def width(self, layer: int) -> int:
        """How many leading dimensions rotate in ``layer``."""
        return 0 if layer in self.still else self.rotary_dim

    def partner(self, d_head: int, layer: int | None = None) -> Int[torch.Tensor, " d_head"]:
        """The dimension that each rotates with, in one layer or in those that rotate."""
        width = self.rotary_dim if layer is None else self.width(layer)
        return pair_partners(d_head, width, self.pairing if width else "none")


@dataclass(frozen=True, eq=False)
class HeadLayout:
    """One layer's slots.

    Attributes:
        width: dimensions of a thin key head.
        order: ``[kv_head, width]``, the original dimension in each slot; -1 where empty.
        frequency: ``[kv_head, width / 2]``, the column of the model's table of angles that each
            slot pair turns by: its rotary pair's, or the one after the last where it doesn't turn;
            None without rotation.
        natural: whether the layout is that of the uncut head.
        still: whether some slot pair doesn't turn.
    """

    width: int
    order: npt.NDArray[np.int64]
    frequency: npt.NDArray[np.int64] | None
    natural: bool
    still: bool = False


def head_layout(
    keep: npt.NDArray[np.bool_], rotary_dim: int, pairing: Pairing = "half"
) -> HeadLayout:
    """Lay out one layer.

    Args:
        keep: ``[kv_head, d_head]``, whole rotary pairs.
        rotary_dim: how many leading dimensions rotate.
        pairing: how they are paired.
    """
    n_heads, d_head = keep.shape
    if rotary_dim == 0:
        width = int(keep.sum(1).max())
        order = np.full((n_heads, width), -1, dtype=np.int64)
        for head, row in enumerate(keep):
            dims = np.flatnonzero(row)
            order[head, : len(dims)] = dims
        return HeadLayout(width, order, None, bool(keep.all()))
    n_pairs = rotary_dim // 2
    adjacent = pairing == "adjacent"
    lower = np.arange(n_pairs) * 2 if adjacent else np.arange(n_pairs)
    upper = lower + 1 if adjacent else lower + n_pairs
    pairs = [np.flatnonzero(row[lower]) for row in keep]
    still = [rotary_dim + np.flatnonzero(row[rotary_dim:]) for row in keep]
    slots = max(len(p) + (len(s) + 1) // 2 for p, s in zip(pairs, still, strict=True))
    order = np.full((n_heads, 2 * slots), -1, dtype=np.int64)
    frequency = np.full((n_heads, slots), n_pairs, dtype=np.int64)
    for head, (turning, single) in enumerate(zip(pairs, still, strict=True)):
        n = len(turning)
        order[head, :n], order[head, slots : slots + n] = lower[turning], upper[turning]
        frequency[head, :n] = turning
        first = (len(single) + 1) // 2
        order[head, n : n + first] = single[:first]
        order[head, slots + n : slots + n + len(single) - first] = single[first:]
    # An empty slot is zero whatever its angle; sharing the widest head's row keeps a layer whose
    # heads differ by padding alone in one shape, and avoids a column of zero frequency.
    if rotary_dim == d_head:
        frequency[frequency == n_pairs] = 0
    natural = bool(keep.all()) and rotary_dim == d_head
    return HeadLayout(2 * slots, order, frequency, natural, bool((frequency == n_pairs).any()))


def value_widths_of(
    widths: int | float | Sequence[int] | None, shape: tuple[int, int, int]
) -> tuple[int, ...] | None:
    """One value width per layer from what a caller may say; see ``SlicePlan.with_values``.

    Raises:
        InputError: no width.
    """
    n_layers, _, d_head = shape
    if widths is None:
        return None
    if isinstance(widths, bool | str):
        raise InputError(f"values={widths!r}: expected a width, a share, or one width per layer")
    if isinstance(widths, float):
        if not 0 < widths <= 1:
            raise InputError(f"values={widths!r}: expected a share above 0 and up to 1")
        return (max(1, round(widths * d_head)),) * n_layers
    if isinstance(widths, int):
        return (widths,) * n_layers
    return tuple(widths)
