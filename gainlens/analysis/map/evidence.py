"""Add evidence that needs the model to a map: sinks, red line, sharing cost, stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gainlens.analysis.map.across_texts import map_stability
from gainlens.analysis.map.coordinates import CoordinateMap, coordinate_map
from gainlens.analysis.map.observation import observe_keys
from gainlens.analysis.map.red_line import find_red_line
from gainlens.analysis.map.sharing_cost import cost_of_sharing
from gainlens.analysis.map.sinks import find_sinks
from gainlens.analysis.map.units import Units, unit_gains
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.data.batches import Tokens
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains
from gainlens.probes.scores import SCORES
from gainlens.stats.verdicts import MARGIN

PARTS = ("sinks", "red_line", "sharing_cost", "stability")


def with_evidence(
    model: Any,
    calibration: Tokens,
    validation: Tokens,
    cmap: CoordinateMap,
    gains: KeyGains,
    *,
    parts: Sequence[str] = ("sinks", "red_line", "sharing_cost"),
    texts: Mapping[str, KeyGains] | None = None,
    score: str | Sequence[str] = "qk",
    margin: float = MARGIN,
    fractions: Sequence[float] = (0.25, 0.5),
    patch: Tokens | bool = False,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> CoordinateMap:
    """The same map with ``sinks``, ``red_line``, ``sharing_cost`` and ``stability`` measured.

    This costs about 25 forward passes over a text for the default parts, and one more per unit with
    ``patch``. Keep the texts small on a CPU.

    Args:
        model: the model on which the gains were gathered.
        calibration: text for observing sinks and for choosing the size of the red line.
        validation: text for evaluation, with other documents.
        cmap: a map of ``gains`` by pair (or by dimension if the model does not rotate its keys).
        gains: the gains given to ``coordinate_map``.
        parts: which parts of ``PARTS`` to measure.
        texts: gains on further texts, by name, for ``stability``.
        score: which gain ranks the units of the red line and the sharing cost; if several are
            given, the best on ``calibration`` is used.
        margin: margin of the red line, nats per token.
        fractions: shares cut for the sharing cost.
        patch: also patch each unit of the red line on its own, on these documents, or on
            ``validation`` if True.
        seed: seed of random controls and permutations.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show progress bars.

    Raises:
        InputError: an unknown part, gains of another model or of other units, or a validation text
            that was already used for a choice.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"parts contains {part!r}: expected only {', '.join(PARTS)}")
    units = _units_of(cmap, gains)
    evaluator = evaluator_of(model, evaluator)
    found: dict[str, Any] = {}
    observation = None
    if "sinks" in parts or "red_line" in parts:
        observation = observe_keys(model, calibration, gains, units, progress=progress)
    if "sinks" in parts and observation is not None:
        found["sinks"] = find_sinks(observation, units, seed=seed)
    if "sharing_cost" in parts:
        found["sharing_cost"] = cost_of_sharing(
            model,
            validation,
            gains,
            fractions,
            score=score,
            choose=calibration,
            seeds=(seed,),
            evaluator=evaluator,
            progress=progress,
        )
    if "red_line" in parts:
        found["red_line"] = find_red_line(
            model,
            calibration,
            validation,
            gains,
            margin=margin,
            score=score,
            observation=observation,
            patch=validation if patch is True else None if patch is False else patch,
            evaluator=evaluator,
            progress=progress,
        )
    if "stability" in parts:
        if not texts:
            raise InputError(
                "parts contains 'stability' but texts is empty: expected gains by name of text"
            )
        found["stability"] = map_stability(
            {"this": gains, **texts},
            score=cmap.facts["score"],
            stage=cmap.facts["stage"],
            unit=cmap.units.kind,
        )
    return replace(cmap, **found)


def _units_of(cmap: CoordinateMap, gains: KeyGains) -> Units:
    fingerprint = (cmap.facts.get("model") or {}).get("fingerprint")
    if fingerprint != gains.model.fingerprint:
        raise InputError(
            "cmap and gains are of different models: expected the gains from which the map was made"
        )
    units = unit_gains(gains, "rms", "rotated")[1]
    if units.kind != cmap.units.kind:
        raise InputError(
            f"cmap is a map of {cmap.units.kind}s: expected {units.kind}s, the units that can be "
            "cut on this model"
        )
    return units


def similarity_table(
    gains: KeyGains,
    *,
    scores: Sequence[str] | None = None,
    stages: Sequence[str] = ("projected", "rotated"),
    units: Sequence[str] = ("dim", "pair"),
    n_permutations: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per gain definition, stage and unit: summary, answer and universal units.

    Args:
        gains: the gains of a model.
        scores: gain definitions; by default all for which the gains have statistics.
        stages, units: rows to include. Without rotary embeddings both stages are the same and
            there are no pairs, so those rows are omitted. Rows that a gain definition does not
            support are omitted too.
        n_permutations, seed: settings of the nulls.
    """
    rows = []
    rotates = bool(gains.model.rotary_dim)
    for score in scores or tuple(SCORES):
        for stage in stages if rotates else ("projected",):
            for unit in units if rotates else ("dim",):
                if scores is None and not _holds(gains, score, stage, unit):
                    continue
                cmap = coordinate_map(
                    gains, score, stage, unit=unit, n_permutations=n_permutations, seed=seed,
                    heads=False,
                )  # fmt: skip
                top = {r["measure"]: r["value"] for r in cmap.table() if r["null"] == "plain"}
                rows.append(
                    {
                        "score": score,
                        "stage": stage,
                        "unit": unit,
                        "answer": cmap.answer,
                        "effect_interval": list(cmap.effect_interval),
                        **cmap.summary(),
                        **{k: v for k, v in top.items() if k.startswith("top ")},
                        "universal_units": list(cmap.universal_units),
                    }
                )
    return rows


def _holds(gains: KeyGains, score: str, stage: str, unit: str) -> bool:
    try:
        gains.score(score, stage=stage, unit=unit)  # type: ignore[arg-type]
    except InputError:
        return False
    return True
