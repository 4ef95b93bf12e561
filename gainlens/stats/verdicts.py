"""``Verdict``: what a claim comes to, with the number and the interval that decide it.

One rule stands behind the word "holds", for every claim about damage (``status_of``): the upper end
of the bootstrap-t interval at 99% lies below the margin, and at least 72 independent documents
were seen. With 36 to 71 the status says which harms they can't show; below 36 nothing holds,
since a harm to one document in ten is missed by 16 documents in 18.5% of all draws, whatever the
interval. ``benchmarks/verdict_simulation.py`` records how often the rule errs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.frames import data_frame
from gainlens.stats.intervals import bootstrap_interval, documents_by_scaling, grouped

Status = Literal[
    "holds", "holds, except for harms in fewer than one document in ten", "fails", "undecided"
]
HOLDS_BUT_RARE: Status = "holds, except for harms in fewer than one document in ten"

MARGIN = 0.02
"""Rise of the loss, in nats per token, that counts as none unless a caller sets another bound."""

LEVEL = 0.99
"""Coverage of the two-sided interval that decides."""
ENOUGH, LEAST = 72, 36
"""Independent documents for "holds", and for "holds" but for rare harms."""
WORST = ("fails", "undecided", HOLDS_BUT_RARE, "holds")


@dataclass(frozen=True)
class Context:
    """Where in a text a claim was judged.

    Attributes:
        positions: first and last position of the tokens that were read.
        distances: least and largest number of tokens between a query and a key.
    """

    positions: tuple[int, int]
    distances: tuple[int, int]

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Context:
        """That of documents of these lengths in tokens, each read whole from position 0."""
        last = max(lengths) - 1
        return cls((0, last), (0, last))

    def __str__(self) -> str:
        return "positions {}–{}, distances {}–{}".format(*self.positions, *self.distances)


@dataclass(frozen=True)
class Verdict:
    """The outcome of testing one claim.

    Attributes:
        status: ``holds``, ``fails``, ``undecided``, or ``holds, except for harms in fewer than
            one document in ten``.
        claim: the claim in words.
        estimate: the number that decides it, in the units that the claim names.
        interval: its confidence interval.
        margin: the bound set beforehand.
        n_documents: how many independent documents it rests on.
        note: anything that a reader must know besides.
        more_documents: how many more would decide it without reserve if mean and spread stay what
            they are; 0 when decided, None when that can't be said.
        domain: names of the texts that it was judged on; empty where nobody said.
        context: positions and distances that it was judged on; None where nobody said.
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

    @property
    def _where(self) -> str:
        domain = f" of {', '.join(self.domain)}" if self.domain else ""
        return domain + (f", {self.context}" if self.context else "")

    def covers(self, *, context: int | None = None, domain: str | None = None) -> bool:
        """Whether the claim was judged there.

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
            InputError: it was not judged there.

        Example:
            >>> short = Verdict("holds", "half can go", 0.0, (0.0, 0.01), 0.02, 80,
            ...                 context=Context.of([256]))
            >>> short.at(context=256).status
            'holds'
            >>> short.covers(context=4096)
            False
        """
        if beyond := self._beyond(context, domain):
            raise InputError(f"{beyond}: {self.claim!r} can't be quoted there, judge it there")
        return self

    def _beyond(self, context: int | None, domain: str | None) -> str:
        """What a place lies beyond; empty where it was judged."""
        if context is not None:
            if self.context is None:
                return f"context={context} but the verdict does not say on which it was judged"
            last = min(self.context.positions[1], self.context.distances[1])
            if context < 1 or context - 1 > last:
                return f"context={context} is outside the 1 to {last + 1} tokens that were judged"
        if domain is not None and domain not in self.domain:
            known = ", ".join(map(repr, self.domain)) or "no named text"
            return f"domain={domain!r} is not what was judged ({known})"
        return ""

    def to_dataframe(self) -> Any:
        """One row; the interval as ``low`` and ``high``, other columns named as the attributes.

        Raises:
            InputError: pandas is not installed.
        """
        where = {"domain": ", ".join(self.domain), "context": str(self.context or "")}
        return data_frame([{**asdict(self), **where}])

    def plot(self, ax: Any = None) -> Any:
        """The interval beside the margin; returns the matplotlib axes, shows nothing."""
        from gainlens.plots.basics import plot_verdict

        return plot_verdict(self, ax)

    def _repr_html_(self) -> str:
        from gainlens.plots.notebook import figure_html

        low, high = self.interval
        return figure_html(
            self,
            f"The claim {self.status}: estimate {self.estimate:.4g} with interval {low:.4g} to "
            f"{high:.4g}, beside the margin {self.margin:.4g}.",
            size=(7, 1.9),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        plain = {**asdict(self), "interval": list(self.interval), "domain": list(self.domain)}
        for key in ("estimate", "margin"):
            plain[key] = _finite(plain[key])
        plain["interval"] = [_finite(bound) for bound in self.interval]
        return plain


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def status_of(interval: tuple[float, float], margin: float, n_documents: int) -> Status:
    """The one rule: damage below ``margin`` holds, fails, or can't be told.

    Args:
        interval: the bootstrap-t interval of the mean damage at ``LEVEL``, or that of a stopping
            rule.
        margin: the bound set beforehand.
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
    """Is the mean of paired differences below ``margin``? A non-inferiority test.

    Args:
        claim: in words.
        differences: damage of each document, e.g. loss with the cut less loss without, in nats.
        margin: the bound set before the differences were seen, above 0.
        groups: a label per document; documents with one label depend on each other (windows of
            one text), are drawn together and count as one.
        domain: names of the texts.
        context: positions and distances that were judged.
        note: anything that a reader must know besides.
        level: coverage of the interval; above ``LEVEL`` where several claims are corrected for.

    Raises:
        InputError: a margin of zero or below, a difference that is not finite.
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
    """As ``judge``, where the interval is there already; see ``status_of`` for which one.

    Raises:
        InputError: a margin that is not a number above 0: absence of damage can't be shown.
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
    """A note, and in words how many more documents would decide what is not decided."""
    if status in ("holds", "fails"):
        return note
    said = (
        "how many more documents would decide it can't be said"
        if more is None
        else f"some {more} more documents would decide it"
    )
    return f"{note}; {said}" if note else said


def worst(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Of one claim judged on several texts the verdict over all of them: the worst decides.

    Each text is judged as if it were alone. No correction is due: that the claim holds
    everywhere is said only where every single test says so.

    Args:
        verdicts: by the name of the text.

    Raises:
        InputError: no verdict.
    """
    if not verdicts:
        raise InputError("verdicts is empty: expected at least one")
    name, found = min(
        verdicts.items(), key=lambda item: (WORST.index(item[1].status), -item[1].estimate)
    )
    note = "; ".join(f"{key}: {verdict.status}" for key, verdict in verdicts.items())
    facts = {**found.__dict__, "note": f"decided by {name}; {note}", "domain": tuple(verdicts)}
    return Verdict(**facts)


def resamples_for(error: float) -> int:
    """How many resamples put twenty beyond either end; of 20,000 and more, at least one."""
    return max(4000, min(math.ceil(40 / error), 20_000), math.ceil(2 / error))
