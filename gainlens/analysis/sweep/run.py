"""Surgery: cut more and more key dimensions, with controls, and measure the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.key_mask import KeyMask, Scope, check_something_stays
from gainlens.ablation.modes import get_mode
from gainlens.ablation.refit_cut import RefitCut
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.analysis.sweep.evaluator import Evaluator, resample_donors
from gainlens.analysis.sweep.judging_text import Cut, check_judge
from gainlens.analysis.sweep.points import ORDERS, Point, check_fractions, sweep_points
from gainlens.analysis.sweep.resume_file import SweepFile
from gainlens.analysis.sweep.resume_header import sweep_header
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.errors import InputError
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.tokens import model_batches
from gainlens.probes.gains import KeyGains, check_same_weights
from gainlens.stats.stopping import StoppingRule
from gainlens.stats.verdicts import LEVEL


def document_losses(
    model: Any,
    documents: Sequence[Int[torch.Tensor, "document pos"]],
    mask: Cut | None = None,
    mode: str = "zero",
    gains: KeyGains | None = None,
) -> Float[np.ndarray, " document"]:
    """Mean next-token loss of each document in nats per token, with ``mask`` cut if given.

    Raises:
        InputError: the loss of a document is not finite.
    """
    evaluator = Evaluator(model)
    return np.concatenate([evaluator.documents(b, mask, mode, gains) for b in documents])


def surgery(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fractions: Sequence[float] = (0.25, 0.5, 0.6, 0.8),
    *,
    score: str | Sequence[str] = "qk",
    scope: Scope | Sequence[Scope] = "head",
    unit: str = "pair",
    mode: str = "zero",
    orders: Sequence[str] = ORDERS,
    seeds: Sequence[int] = (0, 1, 2),
    cuts: Mapping[str, Cut] | None = None,
    stop_margin: float | None = None,
    level: float = LEVEL,
    out: str | Path | None = None,
    fast: bool = True,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> SurgeryCurve:
    """Sweep ablations over fractions, quietest first, beside random and loudest-first controls.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text, other than what the gains were gathered on.
        gains: calibration gains of this model, which choose what is cut.
        fractions: shares of key dimensions to cut, below 1.
        score, scope: one or several; every combination is a curve.
        unit: ``pair`` or ``dim``.
        mode: a row of ``gainlens.ablation.modes.MODES`` other than ``patch``.
        orders: which orders to run; see ``gainlens.analysis.sweep.points.ORDER_TABLE``.
        seeds: of the random controls.
        cuts: further cuts by name (``KeyMask`` or ``RefitCut``), as points of order ``given``.
        stop_margin: stop each point once its rise of the loss, in nats per token, is shown to be
            below or above this; see ``gainlens.stats.stopping``. By default none stops.
        level: of the intervals by which points stop, over all looks together.
        out: a file to which each finished point is written at once; when it is there already,
            the sweep goes on where it stopped.
        fast: allow fused attention where it gives the same loss.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar with the time left.

    Raises:
        InputError: gains of another model, a fraction outside 0..1 or cutting everything, text
            that also chose the cut, a loss that is not finite, a margin of zero or below, a file
            of another sweep.
        FileFormatError: ``out`` is there and damaged.
    """
    get_mode(mode)
    if isinstance(fractions, Real):
        raise InputError(
            f"fractions={fractions!r}: expected a sequence of numbers, e.g. (0.25, 0.5)"
        )
    if mode == "patch":
        raise InputError("mode='patch' needs a cached run of one prompt: see patch_keys")
    points: list[Point] = []
    if len(fractions) or not cuts:
        points = sweep_points(
            tuple(fractions),
            tuple(orders),
            tuple(seeds),
            (score,) if isinstance(score, str) else tuple(score),
            (scope,) if isinstance(scope, str) else tuple(scope),
            unit,
            mode,
        )
    todo: list[tuple[Point, Cut]] = []
    for point in points:
        mask = point.mask(gains)
        check_something_stays(mask, point.fraction)
        todo.append((point, mask))
    todo += [(_given_point(name, cut), cut) for name, cut in (cuts or {}).items()]
    check_same_weights(gains.model, model_fingerprint(model))
    documents = list(model_batches(model, tokens, tokens_per_batch))
    text = text_fingerprint(documents)
    check_judge(documents, gains, (cuts or {}).values(), getattr(model, "tokenizer", None))
    sizes = [len(batch) for batch in documents]
    rule = None if stop_margin is None else StoppingRule.after_batches(sizes, stop_margin, level)
    donors = resample_donors(documents) if mode == "resample" else documents
    evaluator = Evaluator(model, fast=fast)
    file = None
    if out is not None:
        header = sweep_header(
            model, gains, text, todo, sizes, rule, fused=evaluator.fast_copy is not None
        )
        file = SweepFile(out, header)
        file.check_lengths(len(todo) + 1, sum(sizes), () if rule is None else rule.looks)
    losses: list[Float[np.ndarray, " document"]] = [] if file is None else list(file.done)
    with tqdm(
        total=len(todo) + 1, initial=len(losses), desc="surgery", unit="point", disable=not progress
    ) as bar:
        for index in range(len(losses), len(todo) + 1):
            if index == 0:
                found = np.concatenate([evaluator.documents(batch) for batch in documents])
            else:
                point, cut = todo[index - 1]
                found = _run_point(evaluator, documents, donors, point, cut, gains, losses[0], rule)
            losses.append(found)
            if file is not None:
                file.add(found)
            bar.update()
    table = np.full((len(todo), sum(sizes)), np.nan)
    for row, found in zip(table, losses[1:], strict=True):
        row[: len(found)] = found
    n_tokens = sum(batch.numel() for batch in documents)
    return SurgeryCurve(
        [point for point, _ in todo], table, losses[0], gains.model, text, n_tokens, rule
    )


def _run_point(
    evaluator: Evaluator,
    documents: Sequence[torch.Tensor],
    donors: Sequence[torch.Tensor],
    point: Point,
    cut: Cut,
    gains: KeyGains,
    baseline: Float[np.ndarray, " document"],
    rule: StoppingRule | None,
) -> Float[np.ndarray, " run"]:
    """Losses of a point: of all documents, or of as many as decide it."""
    found: Float[np.ndarray, " run"] = np.empty(0)
    for batch, others in zip(documents, donors, strict=True):
        more = evaluator.documents(batch, cut, point.mode, gains, point.seed or 0, others)
        found = np.concatenate([found, more])
        if rule is not None and rule.status(found - baseline[: len(found)]) != "undecided":
            break
    return found


def _given_point(name: str, cut: Cut) -> Point:
    if not isinstance(cut, KeyMask | RefitCut):
        raise InputError(f"cuts[{name!r}]={type(cut).__name__}: expected a KeyMask or a RefitCut")
    mask = cut.mask if isinstance(cut, RefitCut) else cut
    fraction = 1 - mask.fraction_kept
    check_fractions((fraction,))
    facts = mask.facts
    return Point(
        score=str(facts.get("score", "given")),
        scope=str(facts.get("scope", "given")),
        unit=str(facts.get("unit", "given")),
        mode="zero",
        order="given",
        fraction=fraction,
        label=name,
    )
