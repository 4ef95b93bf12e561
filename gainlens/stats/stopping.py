"""Stop a point early once its claim is decided, with the error of all looks together controlled.

Looking at the running interval after every batch and stopping when it clears the margin would
call "holds" too often. Here the error is shared out over the looks beforehand (Bonferroni): by the
union bound the chance that a claim whose true damage is the margin (or more) is ever called
"holds" is at most (1 - level) / 2, however the looks depend on each other, and the same for
"fails" - as far as the interval at each look keeps its promise.

"Holds" has the one rule of ``gainlens.stats.verdicts``: a bootstrap-t interval, at no look before
``ENOUGH`` documents but the last, and then with the reserve that so few documents deserve. So that
little is lost, such looks are few: at ``ENOUGH`` documents, at twice as many, four times …, and
the last. "Fails" needs no such guard, since a harm that has not shown yet only adds to it: from
``MIN_DOCUMENTS`` on every look may spend some of half its error, and the last spends the rest.
Early looks have too few documents for resampling; theirs is Student's interval, widened by
Johnson's (1978) correction on the side to which the differences are skewed.

``benchmarks/verdict_simulation.py`` records how often the rule errs.
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
    level: float = LEVEL

    def __post_init__(self) -> None:
        if not self.margin > 0 or not math.isfinite(self.margin):
            raise InputError(f"margin={self.margin!r} is not a number above 0")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level!r} is outside 0..1")
        if not self.looks or any(b <= a for a, b in zip(self.looks, self.looks[1:], strict=False)):
            raise InputError(f"looks={self.looks!r}: expected rising numbers of documents")

    @classmethod
    def after_batches(cls, sizes: list[int], margin: float, level: float = LEVEL) -> StoppingRule:
        """Look after every batch that brings the total to ``MIN_DOCUMENTS`` or more."""
        ends = [int(n) for n in np.cumsum(sizes)]
        looks = (*(n for n in ends[:-1] if n >= MIN_DOCUMENTS), ends[-1])
        return cls(margin, looks, level)

    @property
    def holds_looks(self) -> tuple[int, ...]:
        """Looks at which a point may be said to hold."""
        found, wanted = [], ENOUGH
        for n in self.looks[:-1]:
            if n >= wanted:
                found.append(n)
                wanted = ENOUGH * 2 ** math.floor(math.log2(n / ENOUGH) + 1)
        return (*found, self.looks[-1])

    def errors(self, n_documents: int) -> tuple[float, float]:
        """Chances of a false "fails" and of a false "holds" that a look may spend.

        Args:
            n_documents: after which the look is taken; none is spent where there is no look.
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
        """Decide at the present look; ``undecided`` also between looks.

        Args:
            differences: rise of the loss per document so far, nats per token.
            margin: another than the rule's; the interval keeps its promise for any.
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
        """The verdict at the look that stopped the point; ``early`` says that documents were left.

        Other arguments as for ``gainlens.stats.verdicts.judge``.
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
        """The interval at the look that stopped the point; its ends spend different errors.

        An end for which the look spends nothing is that of the plain interval at ``level``.

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
    """Student's interval, its end on the skewed side moved out by Johnson's correction.

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
    """``skew_interval`` of many samples of three documents or more, none of them constant."""
    n = values.shape[1]
    quantile = t_quantile(level, n - 1)
    mean, spread = values.mean(1), values.std(1, ddof=1)
    centred = values - mean[:, None]
    raw = (centred**3).mean(1) / (centred**2).mean(1) ** 1.5
    skewness = raw * math.sqrt(n * (n - 1)) / (n - 2)
    shift = spread * (1 + 2 * quantile**2) / (6 * n) * skewness
    half = quantile * spread / math.sqrt(n)
    return mean - half + np.minimum(shift, 0.0), mean + half + np.maximum(shift, 0.0)
