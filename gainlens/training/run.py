"""``TrainingRun``: what training gave, its judgement, and the folder it is kept in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.data.batches import Tokens, batches
from gainlens.data.document_identity import row_hash
from gainlens.data.overlap import check_overlap
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan
from gainlens.frames import data_frame
from gainlens.stats.loss_rise import rise_verdict
from gainlens.stats.verdicts import MARGIN, Verdict
from gainlens.training.folder import save_folder
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
        identities: of the same documents, see ``gainlens.data.overlap``.
    """

    student: Student = field(repr=False)
    plan: SlicePlan
    curve: list[dict[str, Any]] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    trained_on: set[str] = field(repr=False)
    identities: tuple[str, ...] = field(default=(), repr=False)

    @property
    def model(self) -> Any:
        """The trained model, at full width: its ghosts count unless the plan masks them."""
        return self.student.model

    def __repr__(self) -> str:
        rises = [row["rise"] for row in self.curve if row.get("rise") is not None]
        shown = f", monitored rise {rises[-1]:+.4f} nats" if rises else ""
        return (
            f"TrainingRun({self.facts['architecture']}, {self.facts['steps']} steps, "
            f"{self.facts['tokens']:,} tokens, keeps {self.plan.fraction_kept:.1%}{shown})"
        )

    def losses(self, tokens: Tokens, *, intact: bool = False) -> Float[np.ndarray, " document"]:
        """Loss of each document in nats per token, one number per document.

        Args:
            tokens: documents, ``[document, position]`` or a list of any lengths.
            intact: of the original before the cut, instead of the cut and trained model.
        """
        return self.student.document_losses(tokens, intact=intact)

    def judge(self, tokens: Tokens, margin: float = MARGIN) -> Verdict:
        """Whether the loss of the cut and trained model rose by less than ``margin``.

        Args:
            tokens: documents that neither trained the model nor said when to stop.
            margin: nats per token that still count as no rise.

        Raises:
            InputError: documents of the training or parts of them, a margin of zero or below.
        """
        documents = [row for batch in batches(tokens, self.student.vocabulary) for row in batch]
        shared = row_digests(documents) & self.trained_on
        if shared:
            raise InputError(
                f"tokens share {len(shared)} documents with the training: text that trained a "
                "model can't judge it (split='validation' gives other documents)"
            )
        tokenizer = getattr(self.model, "tokenizer", None)
        check_overlap(documents, self.identities, tokenizer=tokenizer, did="trained a model")
        rise = self.losses(documents) - self.losses(documents, intact=True)
        return rise_verdict(rise, 1 - self.plan.fraction_kept, margin)

    def save(
        self,
        folder: str | Path,
        tokenizer: Any | None = None,
        facts: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> Path:
        """Write the trained model: a plain checkpoint, ``plan.json``, ``training.json``.

        The checkpoint has the original's class and its full width; any tool loads it, and computes
        with the ghosts unless the plan cuts them (``gainlens.slim``, ``gainlens.ablate``).

        Args:
            folder: a new or an empty one; written beside and renamed.
            tokenizer: a transformers tokenizer; the model's own by default.
            facts: more for ``training.json``, such as verdicts.
            files: more of them to copy into the folder, by name.

        Returns:
            The folder.

        Raises:
            InputError: the folder holds something or can't be written.
            UnsupportedModelError: weights in a layout that transformers has not (a
                HookedTransformer, a bridge of GPT-2 or GPT-NeoX).
        """
        chosen = getattr(self.model, "tokenizer", None) if tokenizer is None else tokenizer
        about = {**self.facts, "curve": self.curve, **(facts or {})}
        return save_folder(folder, self.model, self.plan, about, chosen, files)

    def to_dataframe(self) -> Any:
        """The curve, one row per step.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.curve)

    def plot(self, ax: Any | None = None) -> Any:
        """Loss against training tokens, the intact model as a line; shows nothing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.
        """
        from gainlens.plots.training_runs import plot_training

        return plot_training(self.curve, ax)

    def _repr_html_(self) -> str:
        from gainlens.plots.notebook import figure_html

        return figure_html(self, "Rise of the loss against training tokens")


def row_digests(rows: Iterable[Int[torch.Tensor, " pos"]]) -> set[str]:
    """A short digest of each document's tokens."""
    return {row_hash(row)[:16] for row in rows}
