"""``Verdict``: the outcome of testing a claim, with the estimate and interval that decide it.

Every claim about damage uses the same rule for "holds" (``status_of``): the upper end of the 99%
bootstrap-t interval is below the margin, with at least 72 independent documents. With 36 to 71
documents the status names the harms that they can't show. With fewer than 36 nothing holds: 16
documents, for example, miss a harm to one document in ten in 18.5% of all draws, whatever the
interval. ``benchmarks/verdict_simulation.py`` records the error rates of this rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed
from gainlens.stats.intervals import bootstrap_interval, documents_by_scaling, grouped

Status = Literal[
    "holds", "holds, except for harms in fewer than one document in ten", "fails", "undecided"
]
HOLDS_BUT_RARE: Status = "holds, except for harms in fewer than one document in ten"

MARGIN = 0.02
"""Default non-inferiority margin on the rise of the loss, in nats per token."""

LEVEL = 0.99
"""Coverage of the two-sided interval that decides a claim."""
ENOUGH, LEAST = 72, 36
"""Minimum numbers of independent documents for "holds", and for "holds" except for rare harms."""
WORST = ("fails", "undecided", HOLDS_BUT_RARE, "holds")


@dataclass(frozen=True)
class Context:
    """The positions and distances on which a claim was judged.

    Attributes:
        positions: first and last token position.
        distances: smallest and largest number of tokens between a query and a key.
    """

    positions: tuple[int, int]
    distances: tuple[int, int]

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Context:
        """The context of documents with these lengths in tokens, each read in full."""
        last = max(lengths) - 1
        return cls((0, last), (0, last))

    def __str__(self) -> str:
        return "positions {}–{}, distances {}–{}".format(*self.positions, *self.distances)


@dataclass(frozen=True)
class Verdict(Displayed):
    """The outcome of testing one claim.

    Attributes:
        status: ``holds``, ``fails``, ``undecided``, or ``holds, except for harms in fewer than
            one document in ten``.
        claim: the claim in words.
        estimate: the deciding number, in the units named by the claim.
        interval: its confidence interval.
        margin: the predefined bound.
        n_documents: number of independent documents behind it.
        note: anything else that a reader must know.
        more_documents: how many more documents would decide it without reserve if mean and spread
            stay the same; 0 if decided, None if unknown.
        domain: names of the texts that it was judged on; empty if not given.
        context: positions and distances that it was judged on; None if not given.

    Example:
        >>> verdict = curve.verdict(fraction=0.5, margin=0.02)
        >>> verdict.status in ("holds", "fails", "undecided")
        True
    """

    status: Status
    claim: str
    estimate: float
    interval: tuple[float, float]
    margin: float
    n_documents: int
    note: str = ""
    more_documents: int | None = None
    domain: tuple[str, ...] = ()
    context: Context | None = None

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Verdict({self.status}: {self.claim}; {self.estimate:.4g} [{low:.4g}, {high:.4g}] "
            f"against {self.margin:.4g}, {self.n_documents} documents{self._where})"
        )

    def __str__(self) -> str:
        """Three lines: the outcome, the number with its unit and bound, and where it was judged."""
        low, high = self.interval
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.status}: {self.claim}\n"
            f"  {self.estimate:+.4g}{unit}, interval {low:+.4g} to {high:+.4g}, "
            f"margin {self.margin:g}\n"
            f"  {self.n_documents} documents{self._where}"
        )

    @property
    def unit(self) -> str:
        """The unit of the estimate as the claim has it: ``nats per token``, or none."""
        return "nats per token" if re.search(r"\bnats\b", self.claim) else ""

    @property
    def _where(self) -> str:
        domain = f" of {', '.join(self.domain)}" if self.domain else ""
        return domain + (f", {self.context}" if self.context else "")

    def covers(self, *, context: int | None = None, domain: str | None = None) -> bool:
        """Whether the claim was judged in this context and domain.

        Args:
            context: length of a text in tokens: its positions and its distances.
            domain: name of a text.
        """
        return not self._beyond(context, domain)

    def at(self, *, context: int | None = None, domain: str | None = None) -> Verdict:
        """This verdict, to be quoted for a context or a domain.

        Args:
            context: length of a text in tokens.
            domain: name of a text.

        Raises:
            InputError: the claim was not judged there.

        Example:
            >>> short = Verdict("holds", "half can go", 0.0, (0.0, 0.01), 0.02, 80,
            ...                 context=Context.of([256]))
            >>> short.at(context=256).status
            'holds'
            >>> short.covers(context=4096)
            False
        """
        if beyond := self._beyond(context, domain):
            raise InputError(f"{beyond}: {self.claim!r} can't be quoted there; judge it there")
        return self

    def _beyond(self, context: int | None, domain: str | None) -> str:
        """Why the claim can't be quoted there; empty if it was judged there."""
        if context is not None:
            if self.context is None:
                return f"context={context}, but the verdict does not record its context"
            last = min(self.context.positions[1], self.context.distances[1])
            if context < 1 or context - 1 > last:
                return f"context={context} is outside the 1 to {last + 1} tokens that were judged"
        if domain is not None and domain not in self.domain:
            known = ", ".join(map(repr, self.domain)) or "no named text"
            return f"domain={domain!r} is not what was judged ({known})"
        return ""

    def to_dataframe(self) -> Any:
        """One row; the interval becomes ``low`` and ``high``, other columns match the attributes.

        Raises:
            InputError: pandas is not installed.
        """
        where = {"domain": ", ".join(self.domain), "context": str(self.context or "")}
        return data_frame([{**asdict(self), **where}])

    def plot(self, ax: Any = None) -> Any:
        """Plot the interval and the margin; returns the matplotlib axes without showing them."""
        from gainlens.plots.basics import plot_verdict

        return plot_verdict(self, ax)

    def _display(self) -> Display:
        low, high = self.interval
        return Display(
            f"The claim {self.status}: estimate {self.estimate:.4g} with interval {low:.4g} to "
            f"{high:.4g}, beside the margin {self.margin:.4g}.",
            size=(7, 1.9),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values."""
        plain = {**asdict(self), "interval": list(self.interval), "domain": list(self.domain)}
        for key in ("estimate", "margin"):
            plain[key] = _finite(plain[key])
        plain["interval"] = [_finite(bound) for bound in self.interval]
        return plain


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def status_of(interval: tuple[float, float], margin: float, n_documents: int) -> Status:
    """The decision rule: damage below ``margin`` holds, fails, or is undecided.

    Args:
        interval: the bootstrap-t interval of the mean damage at ``LEVEL``, or that of a stopping
            rule.
        margin: the predefined bound.
        n_documents: independent documents, or groups of dependent ones.
    """
    low, high = interval
    if low > margin:
        return "fails"
    if high < margin and n_documents >= LEAST:
        return "holds" if n_documents >= ENOUGH else HOLDS_BUT_RARE
    return "undecided"


def judge(
    claim: str,
    differences: Float[np.ndarray, " document"],
    margin: float,
    *,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    domain: Sequence[str] = (),
    context: Context | None = None,
    note: str = "",
    level: float = LEVEL,
) -> Verdict:
    """Non-inferiority test: is the mean of paired differences below ``margin``?

    Args:
        claim: the claim in words.
        differences: damage to each document, e.g. loss with the cut minus loss without, in nats.
        margin: the bound, set before the differences were seen, above 0.
        groups: a label per document. Documents with the same label are dependent (windows of one
            text); they are drawn together and count as one.
        domain: names of the texts.
        context: positions and distances that were judged.
        note: anything else that a reader must know.
        level: coverage of the interval; above ``LEVEL`` when correcting for several claims.

    Raises:
        InputError: the margin is not above 0, or a difference is not finite.
    """
    interval = bootstrap_interval(
        differences, level, groups=groups, resamples=resamples_for(1 - level)
    )
    sums, sizes = grouped(differences, groups)
    return non_inferiority(
        claim,
        float(sums.sum() / sizes.sum()) if len(sizes) else math.nan,
        interval,
        margin,
        len(sizes),
        note,
        domain=domain,
        context=context,
    )


def non_inferiority(
    claim: str,
    estimate: float,
    interval: tuple[float, float],
    margin: float,
    n_documents: int,
    note: str = "",
    *,
    domain: Sequence[str] = (),
    context: Context | None = None,
) -> Verdict:
    """Like ``judge``, with a given interval; see ``status_of`` for which one.

    Raises:
        InputError: the margin is not a number above 0: absence of damage can't be shown.
    """
    if not margin > 0 or not math.isfinite(margin):
        raise InputError(
            f"margin={margin!r} is not a number above 0: no finite text can show zero damage"
        )
    status = status_of(interval, margin, n_documents)
    more: int | None = 0
    if status not in ("holds", "fails"):
        more = documents_by_scaling(interval, estimate, margin, n_documents)
        if more is not None and estimate < margin:
            more = max(more, ENOUGH - n_documents)
    return Verdict(
        status, claim, estimate, interval, margin, n_documents, with_more(note, status, more), more,
        tuple(domain), context,
    )  # fmt: skip


def with_more(note: str, status: Status, more: int | None) -> str:
    """A note, extended by how many more documents would decide an undecided claim."""
    if status in ("holds", "fails"):
        return note
    said = (
        "how many more documents would decide it can't be said"
        if more is None
        else f"some {more} more documents would decide it"
    )
    return f"{note}; {said}" if note else said


def worst(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Combine verdicts on one claim over several texts: the worst one decides.

    The result can be quoted for all of the texts, up to the context that every one was judged on.

    Each text is judged separately. No correction is needed, because the claim holds overall only
    if every single test says that it holds.

    Args:
        verdicts: verdicts by name of the text.

    Raises:
        InputError: there is no verdict.
    """
    if not verdicts:
        raise InputError("verdicts is empty: expected at least one")
    name, found = min(
        verdicts.items(), key=lambda item: (WORST.index(item[1].status), -item[1].estimate)
    )
    note = "; ".join(f"{key}: {verdict.status}" for key, verdict in verdicts.items())
    contexts = [verdict.context for verdict in verdicts.values()]
    known = [one for one in contexts if one is not None]
    shortest = min(known, key=lambda one: one.positions[1]) if len(known) == len(contexts) else None
    return replace(
        found, note=f"decided by {name}; {note}", domain=tuple(verdicts), context=shortest
    )


def resamples_for(error: float) -> int:
    """Number of resamples with about twenty beyond either end; from 20,000 on, at least one."""
    return max(4000, min(math.ceil(40 / error), 20_000), math.ceil(2 / error))
