"""The price of one coordinate system: what a cut costs by what shares a set, and by what is fitted.

Zeroed, a shared set holds the same dimensions for all heads that share it. Refitted, each head maps
its content onto them. With slots, heads share frequencies, and each head moves its content to the
frequency nearest to its own. The three answer different questions: one set of dimensions, of
directions, or of frequencies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import check_fraction
from gainlens.ablation.least_squares_refit import refit
from gainlens.ablation.recipe import ranking_gains, rotates_whole
from gainlens.ablation.slot_fit import fit_slots
from gainlens.analysis.map.sharing_cost import SCOPES, shared_mask
from gainlens.analysis.map.units import unit_gains
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.sweep.judging_text import text_that_judges
from gainlens.data.batches import Tokens
from gainlens.data.texts import Texts
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.files import read_json
from gainlens.files.schema import checking
from gainlens.model.tokens import model_documents
from gainlens.probes.gains import KeyGains
from gainlens.stats.intervals import bootstrap_interval

KINDS = ("zeroed", "refitted", "slots")


@dataclass(frozen=True, eq=False)
class UniversalityPrice:
    """Rise of the loss at one cut, by scope and kind.

    Attributes:
        fraction: share of the key dimensions cut.
        rows: per kind and scope the ``rise`` in nats per token, its 95% ``interval``, and the rise
            ``by_text``.
        rises: per document, ``[row, document]``.
        slots: of the universal slot cut, if it was among the kinds; see ``slot_moves``.
        importance: mean share of each unit in the gain of its head, ``[layer, unit]``.
        score: that gain.
        text: fingerprint of the validation text.
        skipped: why a kind is missing, in words.
    """

    fraction: float
    rows: list[dict[str, Any]]
    rises: Float[np.ndarray, "row document"]
    slots: Mapping[str, Any] | None
    importance: Float[np.ndarray, "layer unit"]
    score: str
    text: str
    skipped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{r['scope']} {r['kind']} {r['rise']:+.3f}" for r in self.rows)
        return (
            f"UniversalityPrice({self.fraction:.0%} cut: {shown}; nats, "
            f"{self.rises.shape[1]} documents)"
        )

    def row(self, scope: str, kind: str) -> dict[str, Any]:
        """One row.

        Raises:
            InputError: this combination was not measured.
        """
        for found in self.rows:
            if (found["scope"], found["kind"]) == (scope, kind):
                return found
        raise InputError(f"scope={scope!r}, kind={kind!r}: not among the measured rows")

    @classmethod
    def load(cls, file: str | Path) -> UniversalityPrice:
        """From the ``report.json`` of a report.

        Raises:
            FileFormatError: no such file, or no price in it.
        """
        found = read_json(Path(file))
        with checking(str(file), "a price of universality"):
            stored = found["reach"]["price"]
            return cls(
                float(stored["fraction"]),
                list(stored["rows"]),
                np.array(stored["rises"], dtype=np.float64),
                stored["slots"],
                np.array(stored["importance"], dtype=np.float64),
                str(stored["score"]),
                str(stored["text"]),
                tuple(stored["skipped"]),
            )

    def plot(self, ax: Any = None, *, margin: float | None = None) -> Any:
        """Bars of the rows; see ``gainlens.plots.universality.plot_price``."""
        from gainlens.plots.universality import plot_price

        return plot_price(self, ax, margin=margin)

    def plot_slots(self, axes: Any = None) -> Any:
        """Slots and what moves where; see ``gainlens.plots.universality.plot_slots``.

        Raises:
            InputError: slots were not among the kinds.
        """
        from gainlens.plots.universality import plot_slots

        if self.slots is None:
            raise InputError("this price has no slots: expected kind 'slots' at scope 'universal'")
        return plot_slots(self.slots, self.importance, axes, score=self.score)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fraction": self.fraction,
            "rows": self.rows,
            "n_documents": int(self.rises.shape[1]),
            "text": self.text,
            "slots": None if self.slots is None else dict(self.slots),
            "rises": self.rises.tolist(),
            "importance": self.importance.tolist(),
            "score": self.score,
            "skipped": list(self.skipped),
        }


def price_of_universality(
    model: Any,
    calibration: Tokens,
    validation: Tokens,
    gains: KeyGains | None = None,
    fraction: float = 0.5,
    *,
    score: str = "fisher",
    scopes: Sequence[str] = SCOPES,
    kinds: Sequence[str] = KINDS,
    rounds: int = 1,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> UniversalityPrice:
    """Cut the same share of every head, with a set per head, per layer or for all heads.

    Args:
        model: a TransformerBridge or HookedTransformer.
        calibration: text that ranks the pairs and fits the maps.
        validation: text that judges, of other documents.
        gains: of the calibration text with ``score``, if gathered already.
        fraction: share to cut, above 0 and below 1.
        score: which gain ranks the units.
        scopes: among ``universal``, ``layer`` and ``head``.
        kinds: among ``zeroed``, ``refitted`` and ``slots``.
        rounds: of the fits, at most.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar.

    Raises:
        InputError: a fraction out of range, an unknown scope or kind, gains of another model,
            validation text that was used for a choice.

    Example:
        >>> price = price_of_universality(model, calibration, validation)
        >>> price.row("universal", "slots")["rise"]
    """
    check_fraction(fraction)
    for name, given, known in (("scopes", scopes, SCOPES), ("kinds", kinds, KINDS)):
        for one in given:
            if one not in known:
                raise InputError(f"{name} contains {one!r}: expected only {', '.join(known)}")
    documents = model_documents(model, calibration)
    if gains is None:
        gains = ranking_gains(model, documents, score, progress=progress)
    values, units = unit_gains(gains, score, "rotated")
    kept = len(units) - round(fraction * len(units))
    if not 0 < kept < len(units):
        raise InputError(f"fraction={fraction!r} cuts none or all of {len(units)} {units.kind}s")
    evaluator = evaluator_of(model, evaluator)
    judge = text_that_judges(evaluator, validation, gains)
    names = _names(validation, len(judge.documents))

    def zeroed(scope: str) -> Cut:
        return shared_mask(values, units, gains.shape[-1], kept, scope)

    def refitted(scope: str) -> Cut:
        mask = shared_mask(values, units, gains.shape[-1], kept, scope)
        return refit(model, documents, mask, rounds=rounds, progress=False)

    def slots(scope: str) -> Cut:
        return fit_slots(
            model, documents, gains, fraction, scope, score=score, rounds=rounds, progress=False
        )

    makers: dict[str, Callable[[str], Cut]] = {
        "zeroed": zeroed,
        "refitted": refitted,
        "slots": slots,
    }
    rows: list[dict[str, Any]] = []
    rises: list[np.ndarray] = []
    skipped: list[str] = []
    universal: dict[str, Any] | None = None
    with tqdm(
        total=len(kinds) * len(scopes), desc="price", unit="cut", disable=not progress
    ) as bar:
        for kind in kinds:
            if kind == "slots" and not rotates_whole(model):
                skipped.append("slots: not all dimensions of a head rotate")
                bar.update(len(scopes))
                continue
            for scope in scopes:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # little text is said once, by best_cut
                        cut = makers[kind](scope)
                except UnsupportedModelError as error:
                    skipped.append(f"{kind}: {error}")
                    break
                finally:
                    bar.update()
                if (kind, scope) == ("slots", "universal"):
                    universal = slot_moves(cut)
                rise = judge.rise(cut)
                rises.append(rise)
                rows.append({"kind": kind, "scope": scope, **_summary(rise, names)})
    total = values.sum(-1, keepdims=True)
    return UniversalityPrice(
        float(fraction),
        rows,
        np.stack(rises) if rises else np.zeros((0, len(names))),
        universal,
        np.divide(values, total, out=np.zeros_like(values), where=total > 0).mean(1),
        score,
        judge.text,
        tuple(skipped),
    )


def slot_moves(cut: Any) -> dict[str, Any]:
    """Where the slots of a universal cut lie, and what moves where.

    Returns:
        ``own`` and ``slots``, frequencies in radians per token, and ``moves[pair][slot]``: how many
        heads first give a pair to a slot (the maps then mix).
    """
    n_pairs = cut.own.shape[1]
    n_slots = int(cut.keep[0, 0].sum()) // 2
    moves = np.zeros((n_pairs, n_slots), dtype=int)
    for head in cut.assigned[..., :n_slots].flatten(0, 1).numpy():
        moves[head, np.arange(n_slots)] += 1
    return {
        "own": cut.own[0].tolist(),
        "slots": cut.frequencies[0, 0, :n_slots].tolist(),
        "moves": moves.tolist(),
    }


def _names(tokens: Tokens, n: int) -> tuple[str, ...]:
    """The text that each document is of."""
    return tuple(tokens.domains) if isinstance(tokens, Texts) else ("",) * n


def _summary(rise: Float[np.ndarray, " document"], names: Sequence[str]) -> dict[str, Any]:
    texts = [name for name in dict.fromkeys(names) if name]
    of = np.array(names)
    return {
        "rise": float(rise.mean()),
        "interval": list(bootstrap_interval(rise)),
        "by_text": {name: float(rise[of == name].mean()) for name in texts},
    }
