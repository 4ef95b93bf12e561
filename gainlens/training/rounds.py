"""Gradual schedules: cut a part, heal, cut more, from one intact model and with one result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import KeyMask, Scope
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan, as_plan
from gainlens.probes import KeyGains
from gainlens.training.plans import plan_digest
from gainlens.training.settings import Settings
from gainlens.training.student import Student


@dataclass(frozen=True)
class Round:
    """A finished round: its plan, settings, curve and facts."""

    plan: SlicePlan
    settings: Settings
    curve: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be unchanged for a later round to resume."""
        return {"plan": plan_digest(self.plan), "steps": self.settings.steps}


def nested_plans(
    gains: KeyGains,
    plan: SlicePlan | Cut,
    rounds: int,
    score: str = "fisher",
    scope: Scope = "layer",
) -> list[SlicePlan]:
    """A series of plans that ends with ``plan``, each a subset of the one before.

    Every round cuts the same share of what the previous round left.

    Args:
        gains: gains that rank the units; they must have ``score``.
        plan: the last plan.
        rounds: number of plans, at least 1.
        score, scope: as for ``KeyMask.quietest``.

    Raises:
        InputError: no rounds, or gains of another shape or without the score.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds={rounds!r}: expected a whole number of at least 1")
    last = as_plan(plan)
    found: list[SlicePlan] = []
    if rounds > 1 and last.frequencies is not None:
        raise InputError(
            f"rounds={rounds} of a plan with slot frequencies: slots of one round are not those of "
            "the next; expected rounds=1"
        )
    for number in range(1, rounds):
        share = last.fraction_kept ** (number / rounds)
        best = KeyMask.quietest(gains, 1 - share, score, scope)
        if best.shape != last.shape:
            raise InputError(f"gains are of shape {best.shape}, the plan of {last.shape}")
        keep = best.keep | last.keep
        if found:
            keep &= found[-1].keep
        found.append(replace(last, keep=keep, maps=None))
    return [*found, last]


def as_rounds(plan: Any) -> list[SlicePlan]:
    """The plans of every round; the maps of the first are where training starts.

    Raises:
        InputError: none, something that is no plan, or one that is not inside the one before.
    """
    several = plan if isinstance(plan, list | tuple) else [plan]
    if not several:
        raise InputError("plan=[]: expected one plan or more")
    plans: list[SlicePlan] = []
    for one in several:
        found = as_plan(one)
        if plans and found.shape != plans[-1].shape:
            raise InputError(
                f"plan {len(plans) + 1} is of shape {found.shape}, the first of {plans[0].shape}"
            )
        if plans and bool((found.keep & ~plans[-1].keep).any()):
            raise InputError(
                f"plan {len(plans) + 1} keeps units that plan {len(plans)} has cut: expected each "
                "plan inside the one before"
            )
        plans.append(found if not plans else replace(found, maps=None))
    if len(plans) > 1 and any(one.frequencies is not None for one in plans):
        raise InputError(
            "several plans, some with slot frequencies: slots of one round are not those of the "
            "next; expected one plan (rounds=1)"
        )
    return plans


def split_steps(settings: Settings, rounds: int) -> list[Settings]:
    """The settings of each round; the last rounds get the remaining steps.

    Raises:
        InputError: fewer steps than rounds.
    """
    if settings.steps < rounds:
        raise InputError(f"steps={settings.steps}: expected one or more for each of {rounds} plans")
    ends = [settings.steps * number // rounds for number in range(rounds + 1)]
    return [replace(settings, steps=end - start) for start, end in itertools.pairwise(ends)]


def round_file(checkpoint: str | Path | None, number: int, rounds: int) -> Path | None:
    """The checkpoint of a round; the last (or only) round uses ``checkpoint`` itself."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if number == rounds - 1:
        return path
    return path.with_name(f"{path.stem}.round-{number + 1}{path.suffix}")


def follow(student: Student, plan: SlicePlan) -> Student:
    """A student of the same intact weights with less active, and trained as far as ``student``."""
    if student.maps is not None:
        maps = student.maps.present()
        group = student.n_heads // plan.shape[1]
        kept = plan.keep[..., None]
        maps = replace(
            maps, queries=maps.queries * kept.repeat_interleave(group, 1), keys=maps.keys * kept
        )
        plan = replace(plan, maps=maps)
    found = Student(student.model, plan, student.train, student.precision)
    earlier = {part.name: part for part in student.slices}
    for part in found.slices:
        part.go_on_from(earlier[part.name])
    return found


def joined_curve(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One curve of all rounds; with several, every row names its round."""
    if len(rounds) == 1:
        return rounds[0].curve
    rows: list[dict[str, Any]] = []
    step = tokens = 0
    for number, one in enumerate(rounds):
        rows += [
            {
                **row,
                "step": row["step"] + step,
                "tokens": row["tokens"] + tokens,
                "round": number + 1,
            }
            for row in one.curve
        ]
        step, tokens = rows[-1]["step"], rows[-1]["tokens"]
    return rows


def joined_facts(rounds: Sequence[Round], settings: Settings) -> dict[str, Any]:
    """The facts of the last round, with the steps, tokens and seconds of all."""
    facts = rounds[-1].facts
    if len(rounds) == 1:
        return facts
    sums = {name: sum(one.facts[name] for one in rounds) for name in ("steps", "tokens", "seconds")}
    rows = [
        {
            "fraction_kept": one.plan.fraction_kept,
            **{name: one.facts[name] for name in ("steps", "tokens", "seconds", "stopped")},
        }
        for one in rounds
    ]
    return {**facts, **sums, "settings": settings.to_json(), "rounds": rows}
