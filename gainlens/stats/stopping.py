"""Stop a point early once its claim is decided, with the error of all looks together controlled.

Looking at the running interval after every batch and stopping when it clears the margin would
call "holds" too often. Here the error is shared out over the looks beforehand (Bonferroni
spending): of that of "holds" a twentieth goes equally to the looks before the last, of that of
"fails" half, the rest to the last look. Gross damage stops a point soon, and one that runs to its
end is judged almost as by the plain test. By the union bound the chance
that a claim whose true damage is the margin (or more) is ever called "holds" is at most
(1 - level) / 2, however the looks depend on each other, and the same for "fails" - as far as the
interval at each look keeps its promise. That interval is Student's, widened by Johnson's (1978)
correction on the side to which the differences are skewed: a few documents that suffer much are
the usual case, and make Student's own upper end too low. Documents are taken to be independent.
No interval of the mean sees a harm that has not shown yet: where one document in five suffers
much, four documents show none of it in 41% of all draws, and agree closely. So "holds" is called
early only after half of the documents and 16 of them; "fails" as soon as it is clear.

Simulated chances of a false "holds", the true damage being the margin (2.5% by construction;
tests/analysis/test_statistics.py): 32 documents in 8 looks give 2% with normal differences, 4 to
5% with exponential ones (skewness 2), 4% where one document in five suffers. The interval promises
less where documents are few and skewed: 7% with 8 exponential ones, as without any early look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.stats.intervals import t_interval, t_quantile
from gainlens.stats.verdicts import Status

MIN_DOCUMENTS = 4
EARLY_HOLDS, EARLY_FAILS = 0.05, 0.5
HOLDS_AFTER, HOLDS_DOCUMENTS = 0.5, 16
"""Share and number of documents before which no point is said to hold."""


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

    def errors(self, n_documents: int) -> tuple[float, float] | None:
        """Chances of a false "fails" and of a false "holds" that a look may spend, if there is one.

        The look is the one after ``n_documents``.
        """
        if n_documents not in self.looks:
            return None
        error, early = (1 - self.level) / 2, len(self.looks) - 1
        if not early:
            return error, error
        last = n_documents == self.looks[-1]
        fails, holds = (
            error * (1 - share if last else share / early) for share in (EARLY_FAILS, EARLY_HOLDS)
        )
        return fails, holds

    def status(
        self, differences: Float[np.ndarray, " document"], margin: float | None = None
    ) -> Status:
        """Decide at the present look; ``undecided`` also between looks.

        Args:
            differences: rise of the loss per document so far, nats per token.
            margin: another than the rule's; the interval keeps its promise for any.
        """
        n = len(differences)
        if n not in self.looks:
            return "undecided"
        margin = self.margin if margin is None else margin
        low, high = self.interval(differences)
        if low > margin:
            return "fails"
        return "holds" if high < margin and n >= self.holds_from else "undecided"

    @property
    def holds_from(self) -> int:
        """After how many documents a point may be said to hold."""
        return min(self.looks[-1], max(HOLDS_DOCUMENTS, math.ceil(HOLDS_AFTER * self.looks[-1])))

    def interval(self, differences: Float[np.ndarray, " document"]) -> tuple[float, float]:
        """The interval at the look that stopped the point; its ends spend different errors."""
        either = (1 - self.level) / 2
        fails, holds = self.errors(len(differences)) or (either, either)
        return (
            skew_interval(differences, 1 - 2 * fails)[0],
            skew_interval(differences, 1 - 2 * holds)[1],
        )


def skew_interval(differences: Float[np.ndarray, " document"], level: float) -> tuple[float, float]:
    """Student's interval, its end on the skewed side moved out by Johnson's correction."""
    low, high = t_interval(differences, level)
    n = len(differences)
    if n < 3 or differences.std() == 0:
        return low, high
    quantile = t_quantile(level, n - 1)
    centred = differences - differences.mean()
    raw = float((centred**3).mean()) / float((centred**2).mean()) ** 1.5
    skewness = raw * math.sqrt(n * (n - 1)) / (n - 2)
    shift = float(differences.std(ddof=1)) * (1 + 2 * quantile**2) / (6 * n) * skewness
    return low + min(shift, 0.0), high + max(shift, 0.0)
