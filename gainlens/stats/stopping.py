"""Stop a point early once its claim is decided, controlling the error over all looks.

Checking the running interval after every batch and stopping when it clears the margin would call
"holds" too often. Here the error is divided among the looks in advance (Bonferroni). By the union
bound, if the true damage is at or above the margin, the probability that the claim is ever called
"holds" is at most (1 - level) / 2, however the looks depend on each other. The same bound applies
to "fails". Both require that the interval at each look has its nominal coverage.

"Holds" follows the rule of ``gainlens.stats.verdicts``, with a bootstrap-t interval. It is tested
only from ``ENOUGH`` documents on, or at the last look, with the caveat for few documents. To spend
little error, these looks are few: at ``ENOUGH`` documents, twice as many, four times as many, …,
and at the end. "Fails" needs no such restriction, since damage not yet seen could only add to it.
From ``MIN_DOCUMENTS`` on, the looks share half of its error, and the last look spends the rest.
Early looks have too few documents for resampling. They use Student's interval, widened by Johnson's
(1978) correction on the side to which the differences are skewed.

``benchmarks/verdict_simulation.py`` records the error rates of this rule.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.stats.intervals import bootstrap_interval, grouped, t_interval, t_quantile
from gainlens.stats.verdicts import (
    ENOUGH,
    LEVEL,
    Context,
    Status,
    Verdict,
    non_inferiority,
    resamples_for,
    status_of,
    with_more,
)

MIN_DOCUMENTS = 4
EARLY_FAILS = 0.5


@dataclass(frozen=True)
class StoppingRule:
    """Decides when a point of a sweep can stop.

    Attributes:
        margin: non-inferiority margin on the rise of the loss, in nats per token, above 0.
        looks: ascending numbers of documents at which to look; the last is the total.
        level: coverage of the two-sided interval over all looks together.

    Raises:
        InputError: the margin is not above 0, the level is outside 0..1, or looks are missing or
            unsorted.
    """

    margin: float
    looks: tuple[int, ...]
    level: float = LEVEL

    def __post_init__(self) -> None:
        if not self.margin > 0 or not math.isfinite(self.margin):
            raise InputError(f"margin={self.margin!r} is not a number above 0")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level!r} is outside 0..1")
        if not self.looks or any(b <= a for a, b in zip(self.looks, self.looks[1:], strict=False)):
            raise InputError(f"looks={self.looks!r}: expected ascending numbers of documents")

    @classmethod
    def after_batches(cls, sizes: list[int], margin: float, level: float = LEVEL) -> StoppingRule:
        """Look after every batch once the total reaches ``MIN_DOCUMENTS``."""
        ends = [int(n) for n in np.cumsum(sizes)]
        looks = (*(n for n in ends[:-1] if n >= MIN_DOCUMENTS), ends[-1])
        return cls(margin, looks, level)

    @property
    def holds_looks(self) -> tuple[int, ...]:
        """Looks at which a point may be called "holds"."""
        found, wanted = [], ENOUGH
        for n in self.looks[:-1]:
            if n >= wanted:
                found.append(n)
                wanted = ENOUGH * 2 ** math.floor(math.log2(n / ENOUGH) + 1)
        return (*found, self.looks[-1])

    def errors(self, n_documents: int) -> tuple[float, float]:
        """Error probabilities for "fails" and for "holds" that a look may spend.

        Args:
            n_documents: number of documents at the look; both are zero if there is no look there.
        """
        error, early, last = (1 - self.level) / 2, len(self.looks) - 1, self.looks[-1]
        holds = error / len(self.holds_looks) if n_documents in self.holds_looks else 0.0
        if n_documents not in self.looks:
            return 0.0, 0.0
        if not early:
            return error, holds
        share = 1 - EARLY_FAILS if n_documents == last else EARLY_FAILS / early
        return error * share, holds

    def status(
        self,
        differences: Float[np.ndarray, " document"],
        margin: float | None = None,
        *,
        groups: Sequence[Hashable] | np.ndarray | None = None,
    ) -> Status:
        """Decide at the current look; ``undecided`` between looks.

        Args:
            differences: rise of the loss per document so far, nats per token.
            margin: replaces the rule's margin; the error control holds for any margin.
            groups: a label per document, see ``gainlens.stats.verdicts.judge``.
        """
        n = len(differences)
        if n not in self.looks:
            return "undecided"
        margin = self.margin if margin is None else margin
        n_groups = len(grouped(differences, groups)[0])
        if n == self.looks[-1] or (n in self.holds_looks and n_groups >= ENOUGH):
            return status_of(self.interval(differences, groups=groups), margin, n_groups)
        return "fails" if self._lower_end(differences, groups) > margin else "undecided"

    def judge(
        self,
        claim: str,
        differences: Float[np.ndarray, " document"],
        margin: float | None = None,
        *,
        groups: Sequence[Hashable] | np.ndarray | None = None,
        domain: Sequence[str] = (),
        context: Context | None = None,
        early: bool = False,
    ) -> Verdict:
        """The verdict at the look that stopped the point; ``early`` means that documents remained.

        Other arguments are those of ``gainlens.stats.verdicts.judge``.
        """
        margin = self.margin if margin is None else margin
        sums, sizes = grouped(differences, groups)
        n, interval = len(sizes), self.interval(differences, groups=groups)
        note = f"{'stopped early' if early else 'run to the end'}; interval over "
        note += f"{len(self.looks)} planned looks"
        mean = float(sums.sum() / sizes.sum()) if n else math.nan
        plain = non_inferiority(claim, mean, interval, margin, n, domain=domain, context=context)
        status, more = self.status(differences, margin, groups=groups), plain.more_documents
        if status == "undecided" and interval[1] < margin:
            later = (look for look in self.holds_looks if look > len(differences))
            more = max(1, next(later, ENOUGH) - len(differences), ENOUGH - n)
        note = with_more(note, status, more)
        return replace(plain, status=status, note=note, more_documents=more)

    def interval(
        self,
        differences: Float[np.ndarray, " document"],
        *,
        groups: Sequence[Hashable] | np.ndarray | None = None,
    ) -> tuple[float, float]:
        """The interval at the look that stopped the point; its two ends spend different errors.

        An end for which the look spends no error is taken from the plain interval at ``level``.

        Args:
            differences: rise of the loss per document so far, nats per token.
            groups: a label per document, see ``gainlens.stats.verdicts.judge``.
        """
        either = (1 - self.level) / 2
        holds = self.errors(len(differences))[1] or either
        upper = _bootstrap(differences, holds, groups)[1]
        return self._lower_end(differences, groups), upper

    def _lower_end(
        self,
        differences: Float[np.ndarray, " document"],
        groups: Sequence[Hashable] | np.ndarray | None,
    ) -> float:
        fails = self.errors(len(differences))[0] or (1 - self.level) / 2
        if len(differences) >= self.looks[-1]:
            return _bootstrap(differences, fails, groups)[0]
        sums, sizes = grouped(differences, groups)
        return skew_interval(sums / sizes, 1 - 2 * fails)[0]


def _bootstrap(
    differences: Float[np.ndarray, " document"],
    error: float,
    groups: Sequence[Hashable] | np.ndarray | None,
) -> tuple[float, float]:
    level = 1 - 2 * error
    return bootstrap_interval(differences, level, groups=groups, resamples=resamples_for(2 * error))


def skew_interval(differences: Float[np.ndarray, " document"], level: float) -> tuple[float, float]:
    """Student's interval, with Johnson's correction extending the end on the skewed side.

    Args:
        differences: one per document, in nats.
        level: coverage, above 0 and below 1.

    Raises:
        InputError: as for ``t_interval``.
    """
    plain = t_interval(differences, level)
    n = len(differences)
    if n < 3 or np.std(differences) == 0:
        return plain
    low, high = skew_ends(np.asarray(differences, dtype=np.float64)[None], level)
    return float(low[0]), float(high[0])


def skew_ends(
    values: Float[np.ndarray, "draw document"], level: float
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """``skew_interval`` for many samples, each non-constant with at least three documents."""
    n = values.shape[1]
    quantile = t_quantile(level, n - 1)
    mean, spread = values.mean(1), values.std(1, ddof=1)
    centred = values - mean[:, None]
    raw = (centred**3).mean(1) / (centred**2).mean(1) ** 1.5
    skewness = raw * math.sqrt(n * (n - 1)) / (n - 2)
    shift = spread * (1 + 2 * quantile**2) / (6 * n) * skewness
    half = quantile * spread / math.sqrt(n)
    return mean - half + np.minimum(shift, 0.0), mean + half + np.maximum(shift, 0.0)
