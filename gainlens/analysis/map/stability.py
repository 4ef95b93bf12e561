"""``Stability``: comparison of the maps of several texts, halves of a text and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Stability:
    """Comparison of the maps of all texts.

    Attributes:
        texts: per text and seed the answer, summary and universal units.
        pairs: per pair of texts the Jaccard overlap of the universal units and the mean
            correlation, over layers, of the gains on the two texts.
        core: units that are universal for every text and seed.
        ever: units that are universal for at least one.
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
