"""The red line: the smallest set of units that keeps the loss within a margin.

It is computed twice: as one universal set for all layers and heads, and as one set per layer (the
same for its heads, and equally large in every layer). The size is found by bisection on calibration
text. The resulting sets are then evaluated on other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.analysis.map.observation import KeyObservation
from gainlens.analysis.map.sharing_cost import ranked_units, shared_mask, unit_mask
from gainlens.analysis.map.similarity import loudest
from gainlens.analysis.map.units import Units, unit_gains
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.sweep.judging_text import text_that_chooses, text_that_judges
from gainlens.data.batches import Tokens
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains
from gainlens.stats.intervals import bootstrap_interval, t_interval
from gainlens.stats.verdicts import LEVEL, MARGIN, Verdict, non_inferiority

SCOPES = ("universal", "layer")


@dataclass(frozen=True, eq=False)
class RedLine:
    """The sets, their cost on the evaluation text, and a description of each universal unit.

    Attributes:
        margin: allowed rise of the loss, nats per token.
        scores: per scope the gain that ranked its units, the one with the smallest set.
        universal: the set for all layers and heads, loudest first.
        per_layer: a set for each layer, loudest first.
        judged: per scope the rise on the evaluation text, its interval and the verdict.
        steps: every bisection step on the calibration text.
        details: per unit of the universal set, measurements for studying it.
        n_units: units per head.
    """

    margin: float
    scores: dict[str, str]
    universal: tuple[int, ...]
    per_layer: tuple[tuple[int, ...], ...]
    judged: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    details: list[dict[str, Any]]
    n_units: int

    def __repr__(self) -> str:
        return (
            f"RedLine({self.margin:g} nats: {len(self.universal)} of {self.n_units} units if all "
            f"layers share them, {len(self.per_layer[0])} if each layer has its own)"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per unit of the universal set, loudest first."""
        return self.details

    def verdict(self, scope: str = "universal") -> Verdict:
        """Whether the set of a scope keeps the loss within the margin on the evaluation text."""
        if scope not in self.judged:
            raise InputError(f"scope={scope!r} is not one of {', '.join(self.judged)}")
        row = self.judged[scope]
        low, high = row["interval"]
        return non_inferiority(
            f"{row['kept']} of {self.n_units} units ({scope}) keep the loss within "
            f"{self.margin:g} nats",
            row["rise"], (low, high), self.margin, row["n_documents"],
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "margin": self.margin,
            "scores": self.scores,
            "n_units": self.n_units,
            "universal": list(self.universal),
            "per_layer": [list(units) for units in self.per_layer],
            "judged": self.judged,
            "verdicts": {name: self.verdict(name).to_json() for name in self.judged},
            "steps": self.steps,
            "units": self.details,
        }


def find_red_line(
    model: Any,
    choose: Tokens,
    judge: Tokens,
    gains: KeyGains,
    *,
    margin: float = MARGIN,
    score: str | Sequence[str] = "qk",
    mode: str = "zero",
    observation: KeyObservation | None = None,
    patch: Tokens | None = None,
    patch_mode: str = "mean",
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> RedLine:
    """Find the sets by bisection, evaluate them, and describe every unit of the universal set.

    The bisection assumes that adding louder units never hurts; every step is in ``steps``. It
    costs about 2·log2(units) forward passes over ``choose`` per score, three over
    ``judge``, and one over ``patch`` per unit.

    Args:
        model: the model.
        choose: text for choosing the size: calibration or training documents.
        judge: validation text for the evaluation.
        gains: the gains that rank the units.
        margin: rise of the loss in nats per token, above 0.
        score: which gain ranks the units; if several, the one with the smallest set on ``choose``.
        mode: ablation mode of the cut.
        observation: from ``observe_keys``, for the gain by position and the tokens.
        patch: text on which each unit of the universal set is patched on its own, in all layers
            and heads; None skips this.
        patch_mode: replacement values of such a unit; ``mean`` removes only its variation with
            position.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar.

    Raises:
        InputError: a margin of zero or below, gains of another model, or ``judge`` text that was
            already used for a choice.
    """
    if not margin > 0:
        raise InputError(f"margin={margin!r} is not above 0: no finite text can show zero damage")
    names = (score,) if isinstance(score, str) else tuple(score)
    values = {name: unit_gains(gains, name, "rotated")[0] for name in names}
    units = unit_gains(gains, names[0], "rotated")[1]
    d_head = gains.shape[-1]
    evaluator = evaluator_of(model, evaluator)
    judger = text_that_judges(evaluator, judge, gains)
    chooser = text_that_chooses(evaluator, choose, judger)
    n_patched = len(units) if patch is not None else 0
    total = 2 * len(names) * int(np.ceil(np.log2(len(units)))) + 2 + n_patched
    steps: list[dict[str, Any]] = []
    judged: dict[str, dict[str, Any]] = {}
    sets: dict[str, np.ndarray] = {}
    scores: dict[str, str] = {}
    with tqdm(total=total, desc="red line", unit="run", disable=not progress) as bar:
        for scope in SCOPES:
            needed = {}
            for name, x in values.items():
                low, high = 0, len(units)  # `low` is not enough, `high` is
                while high - low > 1:
                    kept = (low + high) // 2
                    mask = shared_mask(x, units, d_head, kept, scope)
                    rise = float(chooser.rise(mask.in_mode(mode, gains=gains)).mean())
                    steps.append({"scope": scope, "score": name, "kept": kept, "rise": rise})
                    low, high = (low, kept) if rise <= margin else (kept, high)
                    bar.update()
                needed[name] = high
            best = min(names, key=lambda name: needed[name])
            x, high = values[best], needed[best]
            scores[scope] = best
            sets[scope] = ranked_units(x, scope)[:, 0, :high]
            chosen = shared_mask(x, units, d_head, high, scope)
            found = judger.rise(chosen.in_mode(mode, gains=gains))
            bar.update()
            judged[scope] = {
                "score": best,
                "kept": high,
                "rise": float(found.mean()),
                "interval": list(bootstrap_interval(found, LEVEL)),
                "n_documents": len(found),
            }
        x = values[scores["universal"]]
        universal = tuple(int(u) for u in sets["universal"][0])
        details = _describe(universal, x, units, observation)
        if patch is not None:
            patcher = text_that_judges(evaluator, patch, gains)
            for row in details:
                keep = np.ones(x.shape, dtype=bool)
                keep[..., row["unit"]] = False
                one = unit_mask(keep, units, d_head).in_mode(patch_mode, gains=gains)
                found = patcher.rise(one)
                row["patched_rise"] = float(found.mean())
                row["patched_interval"] = list(t_interval(found))
                row["patch_mode"] = patch_mode
                bar.update()
        bar.total = bar.n
        bar.refresh()
    return RedLine(
        margin=margin,
        scores=scores,
        universal=universal,
        per_layer=tuple(tuple(int(u) for u in row) for row in sets["layer"]),
        judged=judged,
        steps=steps,
        details=details,
        n_units=len(units),
    )


def _describe(
    universal: tuple[int, ...],
    x: Float[np.ndarray, "layer head unit"],
    units: Units,
    observation: KeyObservation | None,
) -> list[dict[str, Any]]:
    """Measurements for studying each unit."""
    top = max(1, len(units) // 4)
    marks = loudest(x.reshape(-1, len(units)), top).reshape(x.shape)
    rows = []
    for rank, u in enumerate(universal):
        used = np.argwhere(marks[..., u] > 0.5)
        row: dict[str, Any] = {
            "rank": rank,
            "unit": u,
            "dims": list(units.dims[u]),
            "frequency": float(units.frequency[u]),
            "wavelength": units.wavelength[u],
            "used_top": top,
            "used_by_heads": [[int(a), int(b)] for a, b in used],
            "used_by_layers": sorted({int(a) for a, _ in used}),
        }
        if observation is not None:
            rms = observation.rms[..., u]
            level = np.sqrt((rms**2).mean(1, keepdims=True))
            relative = np.divide(rms, level, out=np.zeros_like(rms), where=level > 0)
            row["gain_by_position"] = {
                "from_position": observation.bins.tolist(),
                "relative_rms": relative.mean((0, 2)).tolist(),
            }
            row["tokens"] = observation.tokens[u]
        rows.append(row)
    return rows
