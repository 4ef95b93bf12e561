"""Means over documents in buckets of positions or distances, for one cut or several by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from gainlens.ablation.cut import Cut, check_cut
from gainlens.analysis.sweep.evaluator import Evaluator, TextLosses
from gainlens.analysis.sweep.judging_text import check_judge
from gainlens.data.batches import Tokens
from gainlens.data.texts import groups_of
from gainlens.errors import InputError
from gainlens.model.hooks import check_intact
from gainlens.stats.intervals import bootstrap_interval

Bucket = tuple[int, int]
"""First and last position (or distance) in tokens, both included."""


def named_cuts(cuts: Cut | Mapping[str, Cut]) -> dict[str, Cut]:
    """Cuts by name; a single one is called ``cut``.

    Raises:
        InputError: none, or something that is not a cut.
    """
    if not isinstance(cuts, Mapping):
        return {"cut": check_cut(cuts, "cuts")}
    if not cuts:
        raise InputError("cuts is empty: expected at least one cut")
    return {name: check_cut(cut, f"cuts[{name!r}]") for name, cut in cuts.items()}


def text_for(
    evaluator: Evaluator, tokens: Tokens, cuts: Mapping[str, Cut], tokens_per_batch: int, what: str
) -> tuple[TextLosses, tuple[int, ...]]:
    """The documents that judge cuts, and a number per document, the same for windows of one text.

    Args:
        evaluator: of the model.
        tokens: the text.
        cuts: by name.
        tokens_per_batch: upper bound; a longer document is a batch of its own.
        what: is called, for messages.

    Raises:
        InputError: a cut of another model's shape, text that chose one of them, a model that is
            cut at the moment.
    """
    check_intact(evaluator.model, what)
    for cut in cuts.values():
        cut.check(evaluator.sites)
    text = evaluator.on(tokens, tokens_per_batch)
    check_judge(text.documents, None, cuts.values(), getattr(evaluator.model, "tokenizer", None))
    return text, groups_of(tokens) or tuple(range(sum(text.sizes)))


def buckets_up_to(name: str, edges: Sequence[int], last: int) -> tuple[Bucket, ...]:
    """Buckets that begin at each of ``edges``; the last ends at ``last``.

    Args:
        name: of the argument, for the message.
        edges: where buckets begin, rising from 0; those beyond ``last`` are left out.
        last: the largest position or distance that occurs.

    Raises:
        InputError: no edge, the first is not 0, or they don't rise in whole numbers.
    """
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
    rising = whole and all(a < b for a, b in pairwise(edges))
    if not edges or not rising or edges[0] != 0:
        raise InputError(
            f"{name}={tuple(edges)!r}: expected whole numbers that rise from 0, where each bucket "
            "begins"
        )
    begins = [edge for edge in edges if edge <= last]
    return tuple(zip(begins, [b - 1 for b in begins[1:]] + [last], strict=True))


def mean_and_interval(
    values: Float[np.ndarray, " document"], groups: Sequence[int], level: float
) -> tuple[float, tuple[float, float], int]:
    """Mean over the documents that have a value, its bootstrap-t interval, independent documents.

    Args:
        values: NaN for a document without one.
        groups: a number per document; documents with one number are drawn together.
        level: coverage of the interval.
    """
    has = np.isfinite(values)
    labels = [group for group, one in zip(groups, has, strict=True) if one]
    interval = bootstrap_interval(values[has], level, groups=labels)
    return float(values[has].mean()), interval, len(set(labels))


def plain(value: float) -> float | None:
    """For JSON, which knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None
