"""One point of a surgery sweep: which units are cut, and the mask that this makes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from gainlens.ablation.mask import KeyMask, Scope
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains

ORDERS = ("quietest", "random", "loudest")


@dataclass(frozen=True)
class Point:
    """What one ablation of a sweep cuts.

    Attributes:
        order: a row of ``ORDERS``; all but ``quietest`` are controls.
        score, scope, unit, mode: as for ``KeyMask.quietest`` and ``ablation_hooks``.
        fraction: share of key dimensions cut.
        seed: of a random order, else None.
    """

    score: str
    scope: Scope
    unit: str
    mode: str
    order: str
    fraction: float
    seed: int | None = None

    def mask(self, gains: KeyGains) -> KeyMask:
        """The mask of this point."""
        if self.order == "quietest":
            return KeyMask.quietest(gains, self.fraction, self.score, self.scope, self.unit)
        if self.order == "loudest":
            return KeyMask.loudest(gains, self.fraction, self.score, self.scope, self.unit)
        if self.order == "random":
            return KeyMask.random(gains, self.fraction, self.seed or 0, self.scope, self.unit)
        raise InputError(f"order={self.order!r} is not one of {', '.join(ORDERS)}")


def sweep_points(
    fractions: tuple[float, ...],
    orders: tuple[str, ...],
    seeds: tuple[int, ...],
    scores: tuple[str, ...],
    scopes: tuple[Scope, ...],
    unit: str,
    mode: str,
) -> list[Point]:
    """Every combination, controls once per scope and not once per score.

    Raises:
        InputError: no fraction, or one outside 0..1.
    """
    if not fractions:
        raise InputError("fractions is empty: expected at least one between 0 and 1")
    for fraction in fractions:
        if isinstance(fraction, bool) or not 0 <= fraction <= 1:
            raise InputError(f"fraction={fraction!r} is outside 0..1")
        if fraction == 1:
            raise InputError("fraction=1 cuts everything: expected less than 1")
    points = []
    for order, scope, score, fraction in product(orders, scopes, scores, fractions):
        if order == "random":
            if score == scores[0]:
                points += [Point(score, scope, unit, mode, order, fraction, s) for s in seeds]
        else:
            points.append(Point(score, scope, unit, mode, order, fraction))
    return points
