"""``SurgeryCurve``: the losses of a sweep per document, with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.analysis.sweep.curve_shown import curve_display, rises_line
from gainlens.analysis.sweep.curve_verdicts import curve_verdicts
from gainlens.analysis.sweep.points import ORDER_TABLE, Point
from gainlens.errors import InputError
from gainlens.files import opened, read_json, sealed, write_json
from gainlens.files.schema import MOST, checking, listing, maybe, number, record, text, whole
from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed
from gainlens.probes.gains import CARD, ModelCard
from gainlens.stats.by_domain import overall
from gainlens.stats.intervals import bootstrap_interval, group_means, t_interval
from gainlens.stats.stopping import StoppingRule
from gainlens.stats.verdicts import Verdict

METHODS = ("t", "bootstrap")
KIND = "surgery"
POINT = {
    "score": text(),
    "scope": text(),
    "unit": text(),
    "mode": text(),
    "order": text(*ORDER_TABLE, "given"),
    "fraction": number(0, 1),
    "seed": maybe(whole(-MOST)),
    "label": maybe(text()),
}
CURVE = record(
    model=record(**CARD),
    text=text(),
    n_tokens=whole(1),
    lengths=listing(whole(2)),
    domains=listing(text()),
    groups=listing(whole(0)),
    stopping=maybe(record(margin=number(0), looks=listing(whole(1), least=1), level=number(0, 1))),
    baseline=listing(number(), least=1),
    points=listing(record(**POINT, losses=listing(maybe(number()), least=1))),
)
"""Fields of a curve file, besides its seal."""


@dataclass(frozen=True, eq=False)
class SurgeryCurve(Displayed):
    """Losses of every point of a sweep on the same documents.

    Attributes:
        points: the cut of each point.
        losses: nats per token, ``[point, document]``.
        baseline: loss of the intact model, ``[document]``.
        model: the model.
        text: fingerprint of the validation text.
        n_tokens: length of the validation text.
        stopping: the rule for stopping points early, if any; ``losses`` is then NaN for the
            documents that a point did not need.
        lengths: tokens of each document, so that a verdict says on which positions and distances
            it was judged; empty if unknown.
        domains: the name of each document's text; empty if unknown.
        groups: a number per document, equal for windows of one text, which count as one document
            in intervals and verdicts; empty if all documents are independent.

    Raises:
        InputError: a loss is missing or infinite, or the sizes are inconsistent.

    Example:
        >>> curve.save("surgery.json")
        >>> len(gl.SurgeryCurve.load("surgery.json").table()) == len(curve.points)
        True
    """

    points: list[Point]
    losses: Float[np.ndarray, "point document"]
    baseline: Float[np.ndarray, " document"]
    model: ModelCard
    text: str
    n_tokens: int
    stopping: StoppingRule | None = None
    lengths: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_losses(self)
        _check_documents(self)

    def __repr__(self) -> str:
        return (
            f"SurgeryCurve({self.model.architecture}, {len(self.points)} points, "
            f"{self.n_documents} documents, intact loss {self.baseline.mean():.4f} nats; "
            f"rise in nats: {rises_line(self)})"
        )

    @property
    def n_documents(self) -> int:
        """Number of validation documents."""
        return len(self.baseline)

    def deltas(self, index: int) -> Float[np.ndarray, " document"]:
        """Rise of the loss for each document on which point ``index`` was run, nats per token."""
        difference: Float[np.ndarray, " document"] = self.losses[index] - self.baseline
        run: Float[np.ndarray, " document"] = difference[np.isfinite(difference)]
        return run

    def interval(self, index: int, level: float = 0.95, method: str = "t") -> tuple[float, float]:
        """Confidence interval of the mean rise at a point, nats per token.

        For a sweep that stopped early, this is the interval of the stopping rule, which is valid
        over all looks together; ``level`` and ``method`` then have no effect.

        Args:
            index: index of the point.
            level: confidence level.
            method: ``t`` (Student) or ``bootstrap`` (bootstrap-t), over documents.

        Raises:
            InputError: an unknown method, or a level outside 0..1.
        """
        if method not in METHODS:
            raise InputError(f"method={method!r} is not one of {', '.join(METHODS)}")
        deltas = self.deltas(index)
        if self.stopping is not None:
            return self.stopping.interval(deltas, groups=self.groups[: len(deltas)] or None)
        groups = self.groups[: len(deltas)] or None
        if method == "t":
            return t_interval(group_means(deltas, groups), level)
        return bootstrap_interval(deltas, level, groups=groups)

    def mean_and_interval(self, indices: Sequence[int]) -> tuple[float, float, float]:
        """Mean rise over the seeds of one point, with its 95% interval, nats per token.

        The seeds share the documents, so losses are first averaged over seeds for each document.

        Args:
            indices: indices of the points, one per seed.
        """
        if len(indices) == 1:
            return (float(self.deltas(indices[0]).mean()), *self.interval(indices[0]))
        if self.stopping is not None:
            # Seeds may have stopped at different documents, so use the widest of their intervals.
            ends = np.array([self.interval(i) for i in indices])
            mean = float(np.mean([self.deltas(i).mean() for i in indices]))
            return mean, float(ends[:, 0].min()), float(ends[:, 1].max())
        delta = np.mean([self.deltas(i) for i in indices], axis=0)
        return (float(delta.mean()), *t_interval(group_means(delta, self.groups or None)))

    def table(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One row per point: the cut, mean loss, rise over the intact model, and its interval.

        Losses and rises are in nats per token; the interval is Student's t over documents at
        ``level``.
        """
        rows = []
        for index, point in enumerate(self.points):
            delta = self.deltas(index)
            rows.append(
                {
                    **asdict(point),
                    "loss": float(np.nanmean(self.losses[index])),
                    "delta": float(delta.mean()),
                    "interval": self.interval(index, level),
                    "n_documents": len(delta),
                }
            )
        return rows

    def find(self, **wanted: Any) -> list[int]:
        """Indices of the points with these values, e.g. ``order="random", fraction=0.5``."""
        return [
            i
            for i, point in enumerate(self.points)
            if all(getattr(point, key) == value for key, value in wanted.items())
        ]

    def verdict(
        self,
        fraction: float,
        margin: float,
        *,
        order: str = "quietest",
        **choice: Any,
    ) -> Verdict:
        """Is the damage of cutting the quietest ``fraction`` below ``margin``?

        A non-inferiority test on differences paired by document; see ``gainlens.stats.verdicts``.
        With several texts each is judged, and the worst decides (``verdicts`` has them all).

        Args:
            fraction: a fraction of this sweep.
            margin: rise of the loss in nats per token that still counts as flat, above 0; set it
                before you see the results.
            order: order of the point; ``given`` for cuts passed in by name (``label=…``).
            choice: ``score``, ``scope`` … if the sweep has several.

        Raises:
            InputError: no point or several points match, or the margin is zero or below.
        """
        return self.verdict_at(self.index_of(fraction, order=order, **choice), margin)

    def index_of(self, fraction: float, *, order: str = "quietest", **choice: Any) -> int:
        """The one point at a fraction.

        Args:
            fraction, order, choice: as for ``verdict``.

        Raises:
            InputError: no point or several points match.
        """
        unknown = set(choice) - {f.name for f in fields(Point)}
        if unknown:
            raise InputError(f"{sorted(unknown)[0]!r} is not a property of a point")
        found = [
            i
            for i in self.find(order=order, **choice)
            if abs(self.points[i].fraction - fraction) < 1e-9
        ]
        if len(found) != 1:
            have = sorted({p.fraction for p in self.points if p.order == order})
            raise InputError(
                f"fraction={fraction!r} matches {len(found)} points of this sweep: expected one of "
                f"{have}" + (", with score=… and scope=…" if len(found) > 1 else "")
            )
        return found[0]

    def verdict_at(self, index: int, margin: float) -> Verdict:
        """Like ``verdict``, for the point ``index``, which may be a control.

        ``margin`` (nats per token) and errors as for ``verdict``.
        """
        return overall(self.verdicts(index, margin))

    def verdicts(self, index: int, margin: float) -> dict[str, Verdict]:
        """The verdict on point ``index`` for each text by name; all together if it stopped early.

        ``margin`` (nats per token) and errors as for ``verdict``.
        """
        return curve_verdicts(self, [(index, margin)])[0]

    def verdicts_together(self, claims: Sequence[tuple[int, float]]) -> list[Verdict]:
        """Verdicts on several points, corrected (Holm) so that all of them can be quoted.

        Args:
            claims: index of a point and margin in nats per token, for each.

        Raises:
            InputError: a margin that is not a number above 0.
        """
        return [overall(found) for found in curve_verdicts(self, claims)]

    def to_dataframe(self) -> Any:
        """The rows of ``table``, with the 95% interval as ``low`` and ``high``, nats per token.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def plot(self, ax: Any = None, *, margin: float | None = None) -> Any:
        """Rise of the loss over fractions, with intervals and controls, without showing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.
            margin: a margin to draw as a dashed line, nats per token.

        Returns:
            The axes.
        """
        from gainlens.plots.curves import plot_surgery

        return plot_surgery(self, ax, margin)

    def _display(self) -> Display:
        return curve_display(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` reads them back."""
        return sealed(
            KIND,
            {
                "model": asdict(self.model),
                "text": self.text,
                "n_tokens": self.n_tokens,
                "lengths": list(self.lengths),
                "domains": list(self.domains),
                "groups": list(self.groups),
                "stopping": None if self.stopping is None else asdict(self.stopping),
                "baseline": self.baseline.tolist(),
                "points": [
                    {
                        **asdict(point),
                        "losses": [None if math.isnan(x) else x for x in self.losses[i].tolist()],
                    }
                    for i, point in enumerate(self.points)
                ],
            },
        )

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> SurgeryCurve:
        """Read a file written by ``save``.

        Raises:
            FileFormatError: the file is missing, damaged or not a surgery file.
        """
        # Older files lack what curves did not know of their documents.
        data = {
            "lengths": [],
            "domains": [],
            "groups": [],
            **opened(read_json(path), KIND, str(path)),
        }
        with checking(str(path), "surgery"):
            CURVE(data, "file")
            rows = [dict(p) for p in data["points"]]
            losses = np.array([p.pop("losses") for p in rows], dtype=np.float64)
            return cls(
                [Point(**p) for p in rows],
                losses.reshape(len(rows), -1),
                np.array(data["baseline"], dtype=np.float64),
                ModelCard(**data["model"]),
                data["text"],
                data["n_tokens"],
                _rule(data["stopping"]),
                tuple(data["lengths"]),
                tuple(data["domains"]),
                tuple(data["groups"]),
            )


def _check_losses(curve: SurgeryCurve) -> None:
    """Check that every document has a loss at every point, except where a point stopped early.

    A document without a loss would drop out of the differences, and the verdict would silently
    cover only the others.
    """
    losses, n_documents = curve.losses, len(curve.baseline)
    if losses.shape != (len(curve.points), n_documents) or not n_documents:
        raise InputError(
            f"losses have shape {losses.shape}: expected {len(curve.points)} points × "
            f"{n_documents} documents"
        )
    if not np.isfinite(curve.baseline).all():
        raise InputError("baseline: a loss of the intact model is NaN or infinite")
    looks = () if curve.stopping is None else curve.stopping.looks
    for index, row in enumerate(losses):
        run = n_documents if not looks else int((~np.isnan(row)).sum())
        if not np.isfinite(row[:run]).all() or (run < n_documents and run not in looks):
            raise InputError(
                f"losses of point {index} ({curve.points[index].order}, "
                f"{curve.points[index].fraction:.0%} cut): a document has none, or an infinite one"
            )


def _check_documents(curve: SurgeryCurve) -> None:
    """Where lengths and names are known, there is one a document, and the lengths add up."""
    for name, values in (
        ("lengths", curve.lengths),
        ("domains", curve.domains),
        ("groups", curve.groups),
    ):
        if values and len(values) != curve.n_documents:
            raise InputError(
                f"{name} has {len(values)} entries: expected one for each of the "
                f"{curve.n_documents} documents"
            )
    if curve.lengths and sum(curve.lengths) != curve.n_tokens:
        raise InputError(
            f"lengths add up to {sum(curve.lengths)} tokens: expected n_tokens={curve.n_tokens}"
        )


def _rule(data: dict[str, Any] | None) -> StoppingRule | None:
    if data is None:
        return None
    return StoppingRule(data["margin"], tuple(data["looks"]), data["level"])
