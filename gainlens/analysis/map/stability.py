"""``Stability``: the maps of several texts, halves of a text and seeds, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Stability:
    """The map of each text beside that of every other.

    Attributes:
        texts: per text and seed its answer, summary and universal units.
        pairs: per pair of texts the Jaccard overlap of the universal units and the mean
            correlation of a layer's gains with the same layer's on the other text.
        core: units that are universal on every text and seed.
        ever: units that are so on any.
    """

    texts: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    core: tuple[int, ...]
    ever: tuple[int, ...]

    def __repr__(self) -> str:
        answers = sorted({row["answer"] for row in self.texts})
        return (
            f"Stability({len(self.texts)} maps: {' / '.join(answers)}; {len(self.core)} units "
            f"universal in all, {len(self.ever)} in any)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "texts": self.texts,
            "pairs": self.pairs,
            "core": list(self.core),
            "ever": list(self.ever),
        }
