"""Points of a surgery sweep: which units are cut, and the resulting mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from gainlens.ablation.key_mask import KeyMask, Scope, check_fraction
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains

ORDERS = ("quietest", "random", "loudest")
"""Default orders of a sweep."""


@dataclass(frozen=True)
class Point:
    """The cut of one ablation in a sweep.

    Attributes:
        order: a row of ``ORDER_TABLE``, or ``given`` for a cut that was passed in; all but
            ``quietest`` and ``given`` are controls.
        score, scope, unit, mode: as for ``KeyMask.quietest`` and ``ablation_hooks``.
        fraction: share of key dimensions cut.
        seed: seed of a random order, else None.
        label: name of a given cut, else None.
    """

    score: str
    scope: Scope | str
    unit: str
    mode: str
    order: str
    fraction: float
    seed: int | None = None
    label: str | None = None

    def mask(self, gains: KeyGains) -> KeyMask:
        """The mask of this point."""
        return get_order(self.order).mask(self, gains)


@dataclass(frozen=True)
class Order:
    """One row of the table of orders.

    Attributes:
        name: the name that callers use.
        mask: makes the mask of a point.
        seeded: whether it is drawn at random.
        per_score: whether it depends on the score.
        meaning: one line for reports.
    """

    name: str
    mask: Callable[[Point, KeyGains], KeyMask]
    seeded: bool
    per_score: bool
    meaning: str


def _quietest(p: Point, gains: KeyGains) -> KeyMask:
    return KeyMask.quietest(gains, p.fraction, p.score, p.scope, p.unit)  # type: ignore[arg-type]


def _loudest(p: Point, gains: KeyGains) -> KeyMask:
    return KeyMask.loudest(gains, p.fraction, p.score, p.scope, p.unit)  # type: ignore[arg-type]


def _random(p: Point, gains: KeyGains) -> KeyMask:
    return KeyMask.random(gains, p.fraction, p.seed or 0, p.scope, p.unit)  # type: ignore[arg-type]


def _matched(p: Point, gains: KeyGains) -> KeyMask:
    return KeyMask.matched(gains, p.fraction, p.score, p.scope, p.unit, p.seed or 0)  # type: ignore[arg-type]


def _split(p: Point, gains: KeyGains) -> KeyMask:
    return KeyMask.split(gains, p.fraction, p.score, p.scope)  # type: ignore[arg-type]


ORDER_TABLE: dict[str, Order] = {
    o.name: o
    for o in (
        Order("quietest", _quietest, False, True, "the quietest units go first"),
        Order("random", _random, True, False, "units at random"),
        Order("loudest", _loudest, False, True, "the loudest units go first"),
        Order("matched", _matched, True, True, "at random, as many at each rotary frequency"),
        Order("split", _split, False, True, "one dimension of each pair: breaks the rotation"),
    )
}


def get_order(name: str) -> Order:
    """Look up an order by name.

    Raises:
        InputError: the name is unknown.
    """
    if name not in ORDER_TABLE:
        raise InputError(f"order={name!r} is not one of {', '.join(ORDER_TABLE)}")
    return ORDER_TABLE[name]


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Raise ``InputError`` if a fraction is outside 0..1 or cuts everything."""
    for fraction in fractions:
        check_fraction(fraction)
        if fraction == 1:
            raise InputError("fraction=1 cuts everything: expected less than 1")


def sweep_points(
    fractions: tuple[float, ...],
    orders: tuple[str, ...],
    seeds: tuple[int, ...],
    scores: tuple[str, ...],
    scopes: tuple[Scope, ...],
    unit: str,
    mode: str,
) -> list[Point]:
    """All combinations; controls that do not depend on the score run once per scope.

    Raises:
        InputError: no fraction, a fraction outside 0..1, or an unknown order.
    """
    if not fractions:
        raise InputError("fractions is empty: expected at least one between 0 and 1")
    check_fractions(fractions)
    points = []
    for name, scope, score, fraction in product(orders, scopes, scores, fractions):
        order = get_order(name)
        if not order.per_score and score != scores[0]:
            continue
        kind = "dim" if name == "split" else unit
        for seed in seeds if order.seeded else (None,):
            points.append(Point(score, scope, kind, mode, name, fraction, seed))
    return points
