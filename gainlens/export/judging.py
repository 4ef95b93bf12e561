"""The cost of a slim model against the intact one, on text that did not choose the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.analysis.damage_by_position import PositionRise, judge_by_position
from gainlens.analysis.task_running import score_models
from gainlens.analysis.task_scores import INTACT, TaskScores
from gainlens.analysis.tasks import TASKS
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens, as_documents, batches
from gainlens.data.texts import groups_for
from gainlens.errors import InputError
from gainlens.export.modeling import plan_of
from gainlens.model.context import context_of
from gainlens.model.fast_copy import family_head
from gainlens.model.forward import cross_entropy
from gainlens.model.running import model_device
from gainlens.stats.intervals import t_interval
from gainlens.stats.loss_rise import rise_verdict
from gainlens.stats.verdicts import MARGIN, Verdict


@torch.inference_mode()
def document_losses(model: Any, tokens: Tokens) -> Float[np.ndarray, " document"]:
    """Mean next-token loss of each document in nats per token.

    The output head is applied to a few positions at a time.

    Args:
        model: a transformers model, slim or not.
        tokens: documents, ``[document, position]`` or of any lengths.

    Raises:
        InputError: as for ``gainlens.data.batches``; a loss that is not finite.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    parts = [
        token_losses(model, documents).double().mean(1)
        for documents in batches(tokens, vocabulary, TOKENS_PER_BATCH)
    ]
    losses: Float[np.ndarray, " document"] = torch.cat(parts).numpy()
    if not np.isfinite(losses).all():
        first = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise InputError(
            f"the loss of document {first} of tokens is not finite; expected weights without NaN "
            "or infinity"
        )
    return losses


@torch.inference_mode()
def token_losses(
    model: Any, tokens: Int[torch.Tensor, "document pos"]
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss at each position, nats, on the CPU.

    Args:
        model: a transformers model, slim or not.
        tokens: documents of one length.
    """
    batch = tokens.to(model_device(model))
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    return cross_entropy(family_head(model), hidden, batch).cpu()


@torch.inference_mode()
def last_logits(
    model: Any, tokens: Int[torch.Tensor, "document pos"], n: int
) -> Float[torch.Tensor, "document n vocab"]:
    """Logits of the last ``n`` positions, float32 on the CPU; the others never meet the head.

    Args:
        model: a transformers model, slim or not.
        tokens: documents of one length.
        n: number of positions.
    """
    batch = tokens.to(model_device(model))
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    return family_head(model)(hidden[:, -n:]).float().cpu()


def score_slim(
    slim: Any,
    intact: Any | None,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (1024, 2048),
    n: int = 24,
    seed: int = 0,
) -> TaskScores:
    """Scores of a slim model on the tasks of ``gainlens.analysis.score_tasks``.

    Args:
        slim: a transformers model.
        intact: the one that was cut, whose scores come first; None for the model alone.
        tokenizer: of both.
        tasks, lengths, n, seed: as for ``score_tasks``.

    Raises:
        InputError: as for ``score_tasks``.
    """
    models = {} if intact is None else {INTACT: partial(last_logits, intact)}
    label = "model" if intact is None else "slim"
    context = context_of(slim)
    return score_models(
        {**models, label: partial(last_logits, slim)},
        tokenizer,
        context,
        tasks=tasks,
        lengths=lengths,
        n=n,
        seed=seed,
    )


def judge_slim(
    slim: Any,
    intact: Any,
    tokens: Tokens,
    margin: float = MARGIN,
    *,
    trained: bool = False,
    groups: Sequence[int] | None = None,
) -> Verdict:
    """Test whether the loss of a slim model is less than ``margin`` above the intact one.

    Args:
        slim: a transformers model, usually from ``slim`` or ``load_slim``.
        intact: the transformers model that was cut (``slim`` of an identity plan also works).
        tokens: validation text of two documents or more. Of several texts each is judged, and the
            worst decides.
        margin: nats per token that count as no rise.
        trained: whether ``slim`` was trained after the cut; used in the text of the claim.
        groups: as for ``gainlens.surgery``.

    Returns:
        Verdict: paired by document, with the texts and the context of ``tokens``.

    Raises:
        InputError: fewer than two documents, a margin not above zero, or a loss not finite.

    Example:
        >>> from gainlens.model.loading import load_hf
        >>> verdict = judge_slim(gl.slim(model, plan), load_hf("tiny"), validation)
        >>> verdict.status, verdict.estimate, verdict.interval
    """
    return judge_slim_by_position(slim, intact, tokens, margin, trained=trained, groups=groups)[0]


def judge_slim_by_position(
    slim: Any, intact: Any, tokens: Tokens, margin: float = MARGIN, **options: Any
) -> tuple[Verdict, PositionRise]:
    """The verdict of ``judge_slim``, and the rise of the loss by position in the same text.

    Args:
        slim, intact, tokens, margin: as for ``judge_slim``.
        options: ``trained``, ``groups``, ``buckets``; see
            ``gainlens.analysis.damage_by_position.judge_by_position``.

    Raises:
        InputError: as for ``judge_slim``.
    """
    documents = _read(slim, tokens)
    if len(documents) < 2:
        raise InputError(f"tokens holds {len(documents)} document(s): a verdict needs at least 2")
    runs = list(batches(documents, int(slim.config.get_text_config().vocab_size)))
    after, before = ([token_losses(model, run) for run in runs] for model in (slim, intact))
    return judge_by_position(
        tokens, runs, (after, before), _fraction_cut(slim), margin, name="slim", **options
    )


def losses_by_text(
    model: Any,
    texts: Mapping[str, Tokens],
    intact: Any | None = None,
    margin: float = MARGIN,
) -> dict[str, dict[str, Any]]:
    """Loss of a model on several texts, with a verdict against the intact model.

    Args:
        model: a transformers model, slim or not.
        texts: validation documents, by the name of the text.
        intact: the transformers model to compare with; None for only the loss.
        margin: nats per token that count as no rise.

    Returns:
        For each text ``loss`` (nats per token), ``interval`` of it, ``n_documents``, and with
        ``intact`` the plain values of the ``Verdict`` as ``verdict``.

    Raises:
        InputError: as for ``judge_slim``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, tokens in texts.items():
        documents = _read(model, tokens)
        losses = document_losses(model, documents)
        row: dict[str, Any] = {"loss": float(losses.mean()), "n_documents": len(losses)}
        row["interval"] = list(t_interval(losses))
        if intact is not None:
            rise = losses - document_losses(intact, documents)
            row["verdict"] = rise_verdict(
                rise,
                _fraction_cut(model),
                margin,
                trained=False,
                domains=[name] * len(documents),
                lengths=[len(row) for row in documents],
                groups=groups_for(tokens, None, len(documents)) or None,
            ).to_json()
        found[name] = row
    return found


def _read(model: Any, tokens: Tokens) -> list[Int[torch.Tensor, " _"]]:
    return as_documents(tokens, int(model.config.get_text_config().vocab_size))


def _fraction_cut(model: Any) -> float | None:
    """Share of key dimensions that were cut from a slim model; None for other models."""
    try:
        return 1 - plan_of(model.config).fraction_kept
    except InputError:
        return None
