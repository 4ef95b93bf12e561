"""Surgery: cut more and more key dimensions, with controls, and measure the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut, check_cut
from gainlens.ablation.key_mask import Scope, check_something_stays
from gainlens.ablation.masked_cut import donors_for
from gainlens.ablation.modes import get_mode
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.analysis.sweep.evaluator import Evaluator, TextLosses, evaluator_of
from gainlens.analysis.sweep.judging_text import check_judge
from gainlens.analysis.sweep.points import ORDERS, Point, check_fractions, sweep_points
from gainlens.analysis.sweep.resume_file import SweepFile
from gainlens.analysis.sweep.resume_header import sweep_header
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.texts import domains_of, groups_for
from gainlens.errors import InputError
from gainlens.model.hooks import check_intact
from gainlens.probes.gains import KeyGains, check_same_weights
from gainlens.stats.stopping import StoppingRule
from gainlens.stats.verdicts import LEVEL


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
    groups: Sequence[int] | None = None,
    stop_margin: float | None = None,
    level: float = LEVEL,
    out: str | Path | None = None,
    fast: bool = True,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> SurgeryCurve:
    """Sweep ablations over fractions, quietest first, with random and loudest-first controls.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text, different from the text for the gains.
        gains: calibration gains of this model, used to choose the cuts.
        fractions: shares of key dimensions to cut, below 1.
        score, scope: one or several; every combination gives a curve.
        unit: ``pair`` or ``dim``.
        mode: a row of ``gainlens.ablation.modes.MODES`` other than ``patch``.
        orders: which orders to run; see ``gainlens.analysis.sweep.points.ORDER_TABLE``.
        seeds: seeds of the random controls.
        cuts: further cuts by name, of any kind, as points of order ``given``.
        groups: a number per document, equal for documents that depend on each other, such as
            windows of one text; by default those of ``load_tokens``.
        stop_margin: stop each point as soon as its rise of the loss, in nats per token, is shown
            to be below or above this; see ``gainlens.stats.stopping``. By default none stops.
        level: confidence level of the stopping intervals, over all looks together.
        out: a file to which each finished point is written at once. If it already exists, the
            sweep resumes where it stopped.
        fast: allow fused attention if it gives the same loss.
        tokens_per_batch: upper bound on tokens per forward pass.
        evaluator: an ``Evaluator`` of this model, to share between calls; ``fast`` then has no
            effect.
        progress: show a progress bar with the remaining time.

    Raises:
        InputError: gains of another model, a fraction outside 0..1 or one that cuts everything,
            text that was also used to choose the cut, a loss that is not finite, a margin of zero
            or below, or a file of another sweep or that another process is writing.
        FileFormatError: ``out`` exists and is damaged.

    Example:
        >>> curve = gl.surgery(model, validation, gains, fractions=(0.25, 0.5))
        >>> print(curve.verdict(fraction=0.5, margin=0.02))
        >>> rows = curve.table()
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
    check_intact(model, "surgery")
    given = [(given_point(name, cut), cut) for name, cut in (cuts or {}).items()]
    evaluator = evaluator_of(model, evaluator or Evaluator(model, fast=fast))
    check_same_weights(gains.model, evaluator.fingerprint)
    text = evaluator.on(tokens, tokens_per_batch)
    check_judge(text.documents, gains, [cut for _, cut in given], getattr(model, "tokenizer", None))
    labels = groups_for(tokens, groups, sum(text.sizes))
    todo: list[tuple[Point, Cut]] = []
    for point in points:
        mask = point.mask(gains)
        check_something_stays(mask, point.fraction)
        seed = point.seed or 0
        todo.append((point, mask.in_mode(mode, gains=gains, donors=text.documents, seed=seed)))
    todo += given
    if get_mode(mode).takes_donors:
        for batch in text.documents:
            donors_for(batch, text.documents)
    rule = (
        None if stop_margin is None else StoppingRule.after_batches(text.sizes, stop_margin, level)
    )
    file = None
    if out is not None:
        fused = evaluator.fast_copy is not None
        header = sweep_header(model, gains, text.text, todo, text.sizes, rule, fused=fused)
        file = SweepFile(out, header)
        file.check_lengths(len(todo) + 1, sum(text.sizes), () if rule is None else rule.looks)
    losses: list[Float[np.ndarray, " document"]] = [] if file is None else list(file.done)
    bar = tqdm(
        total=len(todo) + 1, initial=len(losses), desc="surgery", unit="point", disable=not progress
    )
    with file or nullcontext(), bar:
        for index in range(len(losses), len(todo) + 1):
            if index == 0:
                found = text.intact
            else:
                found = _run_point(text, todo[index - 1][1], losses[0], rule, labels)
            losses.append(found)
            if file is not None:
                file.add(found)
            bar.update()
    table = np.full((len(todo), sum(text.sizes)), np.nan)
    for row, found in zip(table, losses[1:], strict=True):
        row[: len(found)] = found
    return SurgeryCurve(
        [point for point, _ in todo],
        table,
        losses[0],
        gains.model,
        text.text,
        text.n_tokens,
        rule,
        text.lengths,
        domains_of(tokens) or (),
        labels,
    )


def _run_point(
    text: TextLosses,
    cut: Cut,
    baseline: Float[np.ndarray, " document"],
    rule: StoppingRule | None,
    groups: tuple[int, ...],
) -> Float[np.ndarray, " run"]:
    """Losses of a point on all documents, or until the stopping rule decides."""
    found: Float[np.ndarray, " run"] = np.empty(0)
    for more in text.by_batch(cut):
        found = np.concatenate([found, more])
        if rule is None:
            continue
        rise, labels = found - baseline[: len(found)], groups[: len(found)] or None
        if rule.status(rise, groups=labels) != "undecided":
            break
    return found


def given_point(name: str, cut: Cut) -> Point:
    """The point of a cut that was passed in by name.

    Raises:
        InputError: the value is not a cut, or it cuts everything.
    """
    fraction = 1 - check_cut(cut, f"cuts[{name!r}]").fraction_kept
    check_fractions((fraction,))
    facts = cut.all_facts
    return Point(
        score=str(facts.get("score", "given")),
        scope=str(facts.get("scope", "given")),
        unit=str(facts.get("unit", "given")),
        mode=str(facts.get("mode", "zero")),
        order="given",
        fraction=fraction,
        label=name,
    )
