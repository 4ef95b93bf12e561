"""``TrainingRun``: what training gave, its judgement, and the folder it is kept in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.analysis.intervals import documents_to_decide
from gainlens.analysis.sequential import skew_interval
from gainlens.analysis.verdict import Verdict, non_inferiority
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan
from gainlens.model.batches import Tokens, batches
from gainlens.training.student import Student


@dataclass(eq=False)
class TrainingRun:
    """A trained model and how it came about.

    Attributes:
        student: the model, intact and cut.
        plan: what is active, with the fingerprint of the trained model: for ``gainlens.slim``.
        curve: per step ``step``, ``tokens``, ``loss`` (the objective, nats per position), and
            where it was monitored ``rise`` (nats per token over the intact model) and
            ``interval``.
        facts: settings, text, bytes, seconds.
        trained_on: digests of the documents that trained the model or said when to stop.
    """

    student: Student = field(repr=False)
    plan: SlicePlan
    curve: list[dict[str, Any]] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    trained_on: set[str] = field(repr=False)

    @property
    def model(self) -> Any:
        """The trained model, at full width: its ghosts count unless the plan masks them."""
        return self.student.model

    def losses(self, tokens: Tokens, *, intact: bool = False) -> Float[np.ndarray, " document"]:
        """Loss of each document in nats per token: cut and trained, or of the intact original."""
        return self.student.document_losses(tokens, intact=intact)

    def judge(self, tokens: Tokens, margin: float = 0.02, level: float = 0.95) -> Verdict:
        """Whether the loss of the cut and trained model rose by less than ``margin``.

        Args:
            tokens: documents that neither trained the model nor said when to stop.
            margin: nats per token that still count as no rise.
            level: coverage of the interval over documents, paired with the intact model.

        Raises:
            InputError: documents of the training, a margin of zero or below.
        """
        documents = [row for batch in batches(tokens, self.student.vocabulary) for row in batch]
        shared = row_digests(documents) & self.trained_on
        if shared:
            raise InputError(
                f"tokens share {len(shared)} documents with the training: text that trained a "
                "model can't judge it (split='validation' gives other documents)"
            )
        rise = self.losses(documents) - self.losses(documents, intact=True)
        return rise_verdict(rise, 1 - self.plan.fraction_kept, margin, level)


def rise_verdict(
    rise: Float[np.ndarray, " document"], fraction: float, margin: float, level: float = 0.95
) -> Verdict:
    """The verdict on paired differences of the loss, one per document."""
    return non_inferiority(
        f"with {fraction:.0%} of the key dimensions cut and the rest trained, the loss rises by "
        f"less than {margin:g} nats",
        float(rise.mean()),
        skew_interval(rise, level),
        margin,
        len(rise),
        note="paired by document with the intact model",
        more_documents=documents_to_decide(rise, margin, level),
    )


def row_digests(rows: Iterable[Int[torch.Tensor, " pos"]]) -> set[str]:
    """A short digest of each document's tokens."""
    return {
        hashlib.sha256(row.to("cpu", torch.int64).numpy().astype("<i8").tobytes()).hexdigest()[:16]
        for row in rows
    }
