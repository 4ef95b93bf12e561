"""``train_virtual_width``: train only the active units of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlens.ablation.cut import Cut
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.overlap import document_identities
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan
from gainlens.files import check_writable, locked
from gainlens.model.fingerprint import model_fingerprint
from gainlens.training.plans import check_plan, thin_values
from gainlens.training.rounds import (
    Round,
    as_rounds,
    follow,
    joined_curve,
    joined_facts,
    round_file,
    split_steps,
)
from gainlens.training.run import TrainingRun, row_digests
from gainlens.training.settings import Settings
from gainlens.training.sharding import launched_sharded
from gainlens.training.student import Student
from gainlens.training.trainer import Trainer

VALUE_DOCUMENTS = 32
"""Training documents on which the first thin values are fitted."""


def train_virtual_width(
    model: Any,
    plan: SlicePlan | Cut | Sequence[SlicePlan | Cut],
    tokens: Tokens,
    *,
    steps: int = 200,
    monitor: Tokens | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 20,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    shard: bool | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainingRun:
    """Train the units that a plan keeps, at full tensor width, without the cut units.

    Only the kept rows of W_Q and W_K have a gradient, optimiser state and weight decay. The cut
    (ghost) rows add nothing to any attention logit and do not change by a single bit, so the result
    can be made slim without loss. The weights of the model are written once, at the end: a run that
    fails does not change the model.

    By default this heals a cut. The loss is the divergence from the next-token distribution of the
    intact model, so the model does not learn the domain of the text. ``objective="next_token"``
    trains on the text itself, for models from scratch.

    If a norm acts on the keys (Qwen3, Gemma3), its statistic is over the full width. There the
    ghosts are masked after the norm and still count in it, as in the slim model. If the cut has
    maps, they act after the norm and fold into no projection: ``q`` and ``k`` then train the kept
    rows of the maps, the projections stay as they are, and the maps go with ``TrainingRun.plan``.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model; changed in place.
        plan: a cut of this model, or a ``SlicePlan``. If the cut has maps
            (``gainlens.best_cut``), training starts from them. Several plans, each a subset of the
            one before, cut in rounds: ``steps`` are divided among them, each round has its own
            learning-rate schedule, and the last plan is the result (see ``nested_plans``). If it
            cuts values too, they start from the best low rank on the first documents of
            ``tokens``, and ``train`` must name ``v`` and ``o``.
        tokens: training text, ``[document, position]`` or documents of any length. It must share no
            document with the text that chose the plan or the text that judges.
        steps: optimiser steps in all, each on ``batch`` documents.
        monitor: documents on which the rise of the loss is measured during the run, and which may
            stop it. Take them from the training or calibration text, but not from ``tokens``. They
            choose when to stop, so they cannot judge: see ``TrainingRun.judge``.
        checkpoint: a file that is written every ``save_every`` steps. If it exists, the run resumes
            from it; on a CPU the result has the same bytes as without the interruption. With
            several rounds, each has a file of its own, with the number of the round in the name.
        save_every: steps between checkpoints.
        tokens_per_batch: upper bound on tokens per forward pass; larger steps are accumulated.
        shard: with several processes, divide the layer weights that are not trained among them
            (only transformers models and bridges of them). By default this follows the options of
            ``accelerate launch`` (``--use_fsdp``).
        progress: show a progress bar.
        settings: see ``gainlens.training.Settings``: ``objective`` (``divergence``,
            ``next_token``), ``train`` (``q``, ``k``, ``v``, ``o``, ``mlp``, ``norm``,
            ``embedding``, and ``frequencies`` of slots), ``batch`` (documents per step over all
            processes), ``lr`` (of W_Q and W_K), ``other_lr`` (a third of it by default),
            ``frequency_lr`` (a tenth by default), ``optimizer``, ``betas``,
            ``weight_decay``, ``momentum``, ``clip`` (norm of the gradient), ``warmup`` (steps),
            ``decay``, ``attention`` (weight of the divergence of the attention of every layer),
            ``precision``, ``seed``, ``check_every`` (steps), ``stop_margin`` (nats; stop when the
            monitored rise is shown to be below it).

    Returns:
        TrainingRun: the curve, the plan with the trained model's fingerprint, ``judge`` and
        ``save``.

    Raises:
        InputError: nothing is active; a document has fewer than two tokens or exceeds the context
            of the model; token ids are unknown to the model; ``stop_margin`` without ``monitor``;
            documents are both monitored and trained on; a setting is out of range; a plan is of
            another model or no subset of the one before; the checkpoint is of another run or being
            written by another process; a folder is not writable.
        UnsupportedModelError: this family cannot be made slim.
        TrainingError: the loss or a gradient is not finite; the message names the step.

    Example:
        >>> run = gl.train_virtual_width(model, mask, calibration, steps=2)
        >>> verdict = run.judge(validation, margin=0.02)
    """
    plans = as_rounds(plan)
    try:
        chosen = Settings(steps=steps, **settings)
    except TypeError as error:
        raise InputError(f"settings: {error}") from None
    parts = split_steps(chosen, len(plans))
    if checkpoint is not None:
        check_writable(Path(checkpoint).absolute().parent)
    if isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1:
        raise InputError(f"save_every={save_every!r}: expected a whole number of at least 1")
    if thin_values(plans[0]) and len(plans) > 1:
        raise InputError("several plans, and values are cut: expected one plan (rounds=1)")
    some = None
    if thin_values(plans[0]):
        tokens = list(tokens)  # read twice
        some = tokens[:VALUE_DOCUMENTS]
    student = Student(model, plans[0], chosen.train, chosen.precision, some)
    documents = [row for batch in student.batches(tokens) for row in batch]
    watched = [] if monitor is None else list(student.batches(monitor, "monitor"))
    if chosen.stop_margin is not None and sum(len(batch) for batch in watched) < 2:
        raise InputError(
            f"stop_margin={chosen.stop_margin!r} without monitor: expected two or more documents "
            "whose loss says when to stop"
        )
    for later in plans[1:]:
        check_plan(later)
        later.check_model(plans[0].shape, student.fingerprint, student.architecture)
        later.check_pairs(student.family.pairs(student.config))
    both = row_digests(documents) & row_digests([row for batch in watched for row in batch])
    if both:
        raise InputError(
            f"monitor shares {len(both)} documents with tokens: text that trains can't say when "
            "to stop"
        )
    divided = launched_sharded() if shard is None else shard
    done: list[Round] = []
    for number, (round_plan, part) in enumerate(zip(plans, parts, strict=True)):
        if number:
            student = follow(student, round_plan)
        earlier = [row.identity for row in done]
        trainer = Trainer(student, part, documents, watched, tokens_per_batch, earlier)
        with student.running(), ExitStack() as stack:
            if divided:
                stack.enter_context(student.sharded(trainer.processes))
            file = round_file(checkpoint, number, len(plans))
            if file is not None and trainer.processes.first:
                stack.enter_context(locked(file))
            trainer.run(file, save_every, progress)
        done.append(Round(round_plan, part, trainer.curve, trainer.facts()))
        del trainer  # its optimiser state is not needed while the next round runs
    student.write()
    fingerprint = model_fingerprint(model)
    maps = None
    if student.maps is not None:
        about = {"fingerprint": fingerprint, "trained": True}
        maps = student.maps.present(about, student.frequencies())
    trained_plan = replace(
        plans[-1],
        maps=maps,
        frequencies=student.frequencies(),
        fingerprint=fingerprint,
        facts={**plans[-1].facts, "trained": chosen.to_json()},
    )
    return TrainingRun(
        student,
        trained_plan,
        joined_curve(done),
        joined_facts(done, chosen),
        row_digests(documents) | row_digests([row for batch in watched for row in batch]),
        document_identities([*documents, *watched], getattr(model, "tokenizer", None)),
    )
