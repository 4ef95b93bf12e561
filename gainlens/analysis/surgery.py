"""Surgery: cut more and more key dimensions, with controls, and measure the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.mask import KeyMask, Scope
from gainlens.ablation.refit import RefitCut
from gainlens.analysis.curve import SurgeryCurve
from gainlens.analysis.evaluate import Evaluator
from gainlens.analysis.points import ORDERS, Point, check_fractions, sweep_points
from gainlens.analysis.sequential import StoppingRule
from gainlens.analysis.sweep_file import SweepFile
from gainlens.errors import InputError
from gainlens.model.batches import TOKENS_PER_BATCH, Tokens, batches
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import TextHasher
from gainlens.probes.gains import KeyGains

Cut = KeyMask | RefitCut


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
    level: float = 0.95,
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
        orders: which orders to run; see ``gainlens.analysis.points.ORDER_TABLE``.
        seeds: of the random controls.
        cuts: further cuts by name (``KeyMask`` or ``RefitCut``), as points of order ``given``.
        stop_margin: stop each point once its rise of the loss, in nats per token, is shown to be
            below or above this; see ``gainlens.analysis.sequential``. By default none stops.
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
    todo: list[tuple[Point, Cut]] = [(point, point.mask(gains)) for point in points]
    todo += [(_given_point(name, cut), cut) for name, cut in (cuts or {}).items()]
    fingerprint = model_fingerprint(model)
    if fingerprint != gains.model.fingerprint:
        raise InputError(
            f"gains were gathered on other weights ({gains.model.architecture}, "
            f"{gains.model.fingerprint[:12]}) than this model's ({fingerprint[:12]})"
        )
    documents = list(batches(tokens, int(model.cfg.d_vocab), tokens_per_batch))
    text = _text(documents)
    _check_judge(text, gains, cuts or {})
    sizes = [len(batch) for batch in documents]
    rule = None if stop_margin is None else StoppingRule.after_batches(sizes, stop_margin, level)
    evaluator = Evaluator(model, fast=fast)
    file = None
    if out is not None:
        header = _header(gains, text, todo, sizes, rule, evaluator)
        file = SweepFile(out, header)
    losses: list[Float[np.ndarray, " document"]] = [] if file is None else list(file.done)
    with tqdm(
        total=len(todo) + 1, initial=len(losses), desc="surgery", unit="point", disable=not progress
    ) as bar:
        for index in range(len(losses), len(todo) + 1):
            if index == 0:
                found = np.concatenate([evaluator.documents(batch) for batch in documents])
            else:
                point, cut = todo[index - 1]
                found = _run_point(evaluator, documents, point, cut, gains, losses[0], rule)
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
    point: Point,
    cut: Cut,
    gains: KeyGains,
    baseline: Float[np.ndarray, " document"],
    rule: StoppingRule | None,
) -> Float[np.ndarray, " run"]:
    """Losses of a point: of all documents, or of as many as decide it."""
    found: Float[np.ndarray, " run"] = np.empty(0)
    for batch in documents:
        more = evaluator.documents(batch, cut, point.mode, gains, point.seed or 0)
        found = np.concatenate([found, more])
        if rule is not None and rule.status(found - baseline[: len(found)]) != "undecided":
            break
    return found


def _given_point(name: str, cut: Cut) -> Point:
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


def _text(documents: Sequence[torch.Tensor]) -> str:
    hasher = TextHasher()
    for batch in documents:
        hasher.update(batch)
    return hasher.hexdigest()


def _check_judge(text: str, gains: KeyGains, cuts: Mapping[str, Cut]) -> None:
    chose = set(gains.texts)
    for cut in cuts.values():
        for facts in (cut.facts, cut.mask.facts if isinstance(cut, RefitCut) else {}):
            chose |= {facts["text"]} if "text" in facts else set()
            chose |= set(facts.get("texts", ()))
    if text in chose:
        raise InputError(
            "tokens are the text that the gains were gathered on: text that chose a cut can't "
            "judge it (load_tokens(..., split='validation') gives other documents)"
        )


def _header(
    gains: KeyGains,
    text: str,
    todo: Sequence[tuple[Point, Cut]],
    sizes: Sequence[int],
    rule: StoppingRule | None,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """What must be the same for a sweep to go on; the first difference is what a user is told."""
    cuts = hashlib.sha256()
    for _, cut in todo:
        tensors = (
            (cut.mask.keep, cut.query_maps, cut.key_maps)
            if isinstance(cut, RefitCut)
            else (cut.keep,)
        )
        for tensor in tensors:
            cuts.update(tensor.contiguous().numpy().tobytes())
    return {
        "model": gains.model.fingerprint,
        "text": text,
        "seeds": sorted({p.seed for p, _ in todo if p.seed is not None}),
        "points": [asdict(p) for p, _ in todo],
        "cuts": cuts.hexdigest(),
        "gains": list(gains.texts),
        "batches": list(sizes),
        "stopping": None if rule is None else asdict(rule),
        "attention": "hooks" if evaluator.twin is None else "fused",
    }
