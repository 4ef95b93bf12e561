"""Where a cut hurts: by position, distance, text and task, and the controls of the key claim."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from gainlens.ablation import Cut, KeyMask, best_cut
from gainlens.analysis.damage_by_distance import DistanceChange, change_by_distance
from gainlens.analysis.damage_by_position import PositionRise, rise_by_position
from gainlens.analysis.effective_rank import EffectiveRank, effective_rank
from gainlens.analysis.map.universality import UniversalityPrice, price_of_universality
from gainlens.analysis.side_controls import SideControls, side_controls
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.analysis.task_running import fitting_tasks, score_tasks
from gainlens.analysis.task_scores import TaskScores
from gainlens.data.loading import load_texts, text_names
from gainlens.data.sources import shown_name
from gainlens.data.texts import Texts
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.context import context_of
from gainlens.probes import KeyGains
from gainlens.stats.intervals import bootstrap_interval

if TYPE_CHECKING:
    from gainlens.report.build import Plan
    from gainlens.report.unfinished import Unfinished

SHORTEST = 64
"""Tokens of a long document, at least: on shorter ones there is no position to speak of."""
FRACTION = 0.5


@dataclass(frozen=True, eq=False)
class Reach:
    """What is measured besides the sweep; parts that were skipped are empty or None.

    Attributes:
        by_position: rise of the loss by position, per text.
        by_distance: change of attention by distance between query and key.
        across: the best cut chosen on one text and judged on another, a row per pair of texts.
        tasks: scores on tasks.
        controls: the query side, the values and the complement.
        ranks: effective rank of queries and keys.
        price: of sharing one set, zeroed, refitted and with slots.
        skipped: why a part is missing, in words.
    """

    by_position: Mapping[str, PositionRise]
    by_distance: DistanceChange | None = None
    across: Sequence[Mapping[str, Any]] = ()
    tasks: TaskScores | None = None
    controls: SideControls | None = None
    ranks: EffectiveRank | None = None
    price: UniversalityPrice | None = None
    skipped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "by_position": {name: rise.to_json() for name, rise in self.by_position.items()},
            "by_distance": None if self.by_distance is None else self.by_distance.to_json(),
            "across_texts": [dict(row) for row in self.across],
            "tasks": None if self.tasks is None else self.tasks.to_json(),
            "controls": None if self.controls is None else self.controls.table(),
            "effective_rank": None if self.ranks is None else self.ranks.summary(),
            "price": None if self.price is None else self.price.to_json(),
            "skipped": list(self.skipped),
        }


def measure_reach(
    evaluator: Evaluator,
    plan: Plan,
    gains: KeyGains,
    cuts: Mapping[str, Cut],
    texts: tuple[Texts, Texts],
    kept: Unfinished,
) -> Reach:
    """Everything in ``Reach`` that the plan asks for.

    Args:
        evaluator: of the model.
        plan: the settings of the report.
        gains: of the calibration text.
        cuts: by name; the first is the best, which the tasks score.
        texts: short documents for calibration and for validation.
        kept: parts of a killed run.
    """
    model, (calibration, validation) = evaluator.model, texts
    all_skipped: list[str] = []

    def part(name: str, make: Callable[[list[str]], Any]) -> Any:
        """A result, and the reasons for what is missing from it."""

        def both() -> tuple[Any, list[str]]:
            said: list[str] = []
            return make(said), said

        found, said = kept.part(name, both)
        all_skipped.extend(said)
        return found

    @cache
    def long() -> tuple[dict[str, Texts], list[str]]:
        said: list[str] = []
        return dict(long_texts(model, plan, said)), said

    def position(said: list[str]) -> dict[str, PositionRise]:
        found, missing = long()
        said += missing
        return {
            name: rise_by_position(model, text, cuts, buckets=plan.buckets, evaluator=evaluator)
            for name, text in found.items()
        }

    def distance(said: list[str]) -> DistanceChange | None:
        first = [text[0] for text in long()[0].values()]
        try:
            return change_by_distance(model, first, cuts, evaluator=evaluator) if first else None
        except UnsupportedModelError as error:
            said.append(f"change of attention by distance: {error}")
            return None

    def controls(said: list[str]) -> SideControls | None:
        if not plan.damage_docs:
            return None
        some = list(validation[: plan.damage_docs])
        mask = KeyMask.quietest(gains, FRACTION, plan.score)
        return side_controls(model, some, gains, mask, seeds=plan.seeds[:1])

    def ranks(said: list[str]) -> EffectiveRank | None:
        some = list(calibration[: plan.damage_docs])
        return effective_rank(model, some) if some else None

    return Reach(
        part("by_position", position),
        part("by_distance", distance),
        part("across_texts", lambda said: across_texts(evaluator, plan, said)),
        part("tasks", lambda said: tasks_of(evaluator, plan, cuts, said)),
        part("controls", controls),
        part("ranks", ranks),
        part("price", lambda said: price_of(evaluator, plan, texts)),
        tuple(all_skipped),
    )


def price_of(
    evaluator: Evaluator, plan: Plan, texts: tuple[Texts, Texts]
) -> UniversalityPrice | None:
    """What sharing one set of dimensions or of frequencies costs; None if it was skipped."""
    if plan.price_docs < 1 or plan.refit_rounds < 1:
        return None
    calibration, validation = texts
    return price_of_universality(
        evaluator.model,
        calibration,
        spread(validation, plan.price_docs),
        fraction=FRACTION,
        evaluator=evaluator,
    )


def spread(texts: Texts, n: int) -> Texts:
    """The first ``n`` documents of each text."""
    rows = [[i for i, of in enumerate(texts.domains) if of == name][:n] for name in texts.names]
    return texts.chosen([i for some in rows for i in some])


def long_texts(model: Any, plan: Plan, skipped: list[str]) -> Iterator[tuple[str, Texts]]:
    """Long validation documents of each text: as long as the text has enough of them."""
    if plan.long_docs < 1:
        return
    longest = min(plan.context, context_of(model) or plan.context)
    for source in text_names(plan.text):
        length, why = longest, f"context={plan.context} is below {SHORTEST} tokens"
        while length >= SHORTEST:
            try:
                found = load_texts(
                    source, model, n_docs=plan.long_docs, length=length, split="validation"
                )
                yield shown_name(source), found
                break
            except InputError as error:
                length, why = length // 2, str(error)
        else:
            skipped.append(f"rise by position on {shown_name(source)}: {why}")


def across_texts(evaluator: Evaluator, plan: Plan, skipped: list[str]) -> list[dict[str, Any]]:
    """The best cut at 0.5 chosen on each text, judged on every text; empty with one text."""
    names = [shown_name(source) for source in text_names(plan.text)]
    if len(names) < 2 or plan.across_docs < 1:
        return []
    model, rows = evaluator.model, []
    judges = {}
    for name in names:
        found = load_texts(
            name, model, n_docs=plan.across_docs, length=plan.length, split="validation"
        )
        judges[name] = evaluator.on(list(found))
    for chosen in names:
        text = _as_many(chosen, model, plan)
        if isinstance(text, str):
            skipped.append(f"a cut chosen on {chosen} alone: {text}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the main cut has said it
            cut = best_cut(model, text, FRACTION, rounds=plan.refit_rounds)
        for judged, losses in judges.items():
            rise = losses.losses(cut) - losses.intact
            low, high = bootstrap_interval(rise)
            rows.append(
                {
                    "chosen_on": chosen,
                    "judged_on": judged,
                    "rise": float(rise.mean()),
                    "interval": [low, high],
                    "n_documents": len(rise),
                    "n_calibration": len(text),
                }
            )
    return rows


def _as_many(name: str, model: Any, plan: Plan) -> Texts | str:
    """Calibration documents of one text, fewer where it has fewer; why there are none."""
    n_docs, why = plan.n_docs, ""
    while n_docs:
        try:
            return load_texts(name, model, n_docs=n_docs, length=plan.length, split="calibration")
        except InputError as error:
            n_docs, why = n_docs // 2, str(error)
    return why


def tasks_of(
    evaluator: Evaluator, plan: Plan, cuts: Mapping[str, Cut], skipped: list[str]
) -> TaskScores | None:
    """Scores of the intact model and of the first cut on tasks."""
    if plan.task_prompts < 2:
        return None
    model = evaluator.model
    length = min(plan.task_length, context_of(model) or plan.task_length)
    fitting, why = fitting_tasks(model.tokenizer, (length,), plan.task_prompts, plan.seed)
    skipped += why
    if not fitting:
        return None
    return score_tasks(
        model,
        dict(list(cuts.items())[:1]),
        tasks=fitting,
        lengths=(length,),
        n=plan.task_prompts,
        seed=plan.seed,
        evaluator=evaluator,
    )
