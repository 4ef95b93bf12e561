"""Stop a point early once its claim is decided, with the error of all looks together controlled.

Looking at the running interval after every batch and stopping when it clears the margin would
call "holds" too often. Here the error is shared out over the looks beforehand (Bonferroni
spending): a fifth equally among the looks before the last, the rest to the last one, so that a
point that runs to its end is judged almost as by the plain test. By the union bound the chance
that a claim whose true damage is the margin (or more) is ever called "holds" is at most
(1 - level) / 2, however the looks depend on each other; the same holds for "fails". The
assumption is that of Student's interval at each look: documents are independent, and means of a
few of them nearly normal. The first looks rest on few documents, so none is taken before
``MIN_DOCUMENTS``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gainlens.analysis.intervals import t_interval
from gainlens.analysis.verdict import Status
from gainlens.errors import InputError

MIN_DOCUMENTS = 4
EARLY_SHARE = 0.2


@dataclass(frozen=True)
class StoppingRule:
    """When a point of a sweep is decided.

    Attributes:
        margin: rise of the loss in nats per token that would still count as flat, above 0.
        looks: after how many documents each look is taken, rising; the last is all of them.
        level: coverage of the two-sided interval over all looks together.

    Raises:
        InputError: a margin of zero or below, a level outside 0..1, no or unsorted looks.
    """

    margin: float
    looks: tuple[int, ...]
    level: float = 0.95

    def __post_init__(self) -> None:
        if not self.margin > 0 or not math.isfinite(self.margin):
            raise InputError(f"margin={self.margin!r} is not a number above 0")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level!r} is outside 0..1")
        if not self.looks or any(b <= a for a, b in zip(self.looks, self.looks[1:], strict=False)):
            raise InputError(f"looks={self.looks!r}: expected rising numbers of documents")

    @classmethod
    def after_batches(cls, sizes: list[int], margin: float, level: float = 0.95) -> StoppingRule:
        """Look after every batch that brings the total to ``MIN_DOCUMENTS`` or more."""
        ends = [int(n) for n in np.cumsum(sizes)]
        looks = (*(n for n in ends[:-1] if n >= MIN_DOCUMENTS), ends[-1])
        return cls(margin, looks, level)

    def look_level(self, n_documents: int) -> float | None:
        """Coverage of the two-sided interval at the look after so many documents, if there is one.

        It is 1 - (the share of the error that this look may spend).
        """
        if n_documents not in self.looks:
            return None
        error, early = 1 - self.level, len(self.looks) - 1
        if not early:
            return self.level
        if n_documents == self.looks[-1]:
            return 1 - error * (1 - EARLY_SHARE)
        return 1 - error * EARLY_SHARE / early

    def status(self, differences: Float[np.ndarray, " document"]) -> Status:
        """Decide at the present look; ``undecided`` also between looks."""
        level = self.look_level(len(differences))
        if level is None:
            return "undecided"
        low, high = t_interval(differences, level)
        return "holds" if high < self.margin else "fails" if low > self.margin else "undecided"

    def interval(self, differences: Float[np.ndarray, " document"]) -> tuple[float, float]:
        """The interval at the look that stopped the point."""
        return t_interval(differences, self.look_level(len(differences)) or self.level)
