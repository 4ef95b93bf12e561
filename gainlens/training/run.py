"""``TrainingRun``: the result of training, how it is judged, and how it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.analysis.damage_by_position import BUCKETS, PositionRise, judge_by_position
from gainlens.data.batches import Tokens
from gainlens.data.document_identity import row_hash
from gainlens.data.overlap import check_overlap
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan
from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed
from gainlens.stats.verdicts import MARGIN, Verdict
from gainlens.training.folder import save_folder
from gainlens.training.student import Student


@dataclass(eq=False)
class TrainingRun(Displayed):
    """A trained model and the record of its training.

    Attributes:
        student: the model, both intact and cut.
        plan: the active units, with the fingerprint of the trained model, for ``gainlens.slim``.
        curve: for each step ``step``, ``tokens`` and ``loss`` (the objective, nats per position);
            at monitored steps also ``rise`` (nats per token over the intact model) and
            ``interval``.
        facts: settings, text, bytes, seconds.
        trained_on: digests of the documents that trained the model or decided when to stop.
        identities: identities of the same documents, see ``gainlens.data.overlap``.
    """

    student: Student = field(repr=False)
    plan: SlicePlan
    curve: list[dict[str, Any]] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    trained_on: set[str] = field(repr=False)
    identities: tuple[str, ...] = field(default=(), repr=False)

    @property
    def model(self) -> Any:
        """The trained model at full width; ghosts contribute unless the plan masks them."""
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
            intact: measure the original before the cut instead of the trained model.
        """
        return self.student.document_losses(tokens, intact=intact)

    def judge(
        self, tokens: Tokens, margin: float = MARGIN, *, groups: Sequence[int] | None = None
    ) -> Verdict:
        """Test whether the loss of the cut and trained model rose by less than ``margin``.

        The verdict carries the texts and the context of the documents. With several texts each is
        judged, and the worst decides.

        Args:
            tokens: documents that neither trained the model nor decided when to stop.
            margin: largest rise that counts as none, nats per token.
            groups: as for ``gainlens.surgery``.

        Raises:
            InputError: documents overlap with the training text, or the margin is not above zero.
        """
        return self.judge_by_position(tokens, margin, groups=groups, progress=False)[0]

    def judge_by_position(
        self,
        tokens: Tokens,
        margin: float = MARGIN,
        *,
        buckets: Sequence[int] = BUCKETS,
        groups: Sequence[int] | None = None,
        progress: bool = True,
    ) -> tuple[Verdict, PositionRise]:
        """The verdict of ``judge``, and the rise of the loss by position in the same text.

        Args:
            tokens, margin, groups: as for ``judge``.
            buckets: as for ``gainlens.analysis.rise_by_position``.
            progress: show a progress bar.

        Raises:
            InputError: as for ``judge``; buckets that don't rise from 0.
        """
        documents = self.check_apart(tokens)
        runs = list(self.student.batches(documents))
        before, after = [], []
        for run in tqdm(runs, desc="judging", unit="batch", disable=not progress):
            before.append(self.student.token_losses(run, intact=True))
            after.append(self.student.token_losses(run))
        return judge_by_position(
            tokens,
            runs,
            (after, before),
            1 - self.plan.fraction_kept,
            margin,
            name="trained",
            trained=True,
            buckets=buckets,
            groups=groups,
        )

    def check_apart(self, tokens: Tokens) -> list[Int[torch.Tensor, " _"]]:
        """The documents of a text, if it may judge.

        Args:
            tokens: as for ``judge``.

        Raises:
            InputError: they overlap with the training text.
        """
        documents = [row for batch in self.student.batches(tokens) for row in batch]
        shared = row_digests(documents) & self.trained_on
        if shared:
            raise InputError(
                f"tokens share {len(shared)} documents with the training: text that trained a "
                "model can't judge it (split='validation' gives other documents)"
            )
        tokenizer = getattr(self.model, "tokenizer", None)
        check_overlap(documents, self.identities, tokenizer=tokenizer, did="trained a model")
        return documents

    def save(
        self,
        folder: str | Path,
        tokenizer: Any | None = None,
        facts: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> Path:
        """Write the trained model as a plain checkpoint, with ``plan.json`` and ``training.json``.

        The checkpoint has the class and the full width of the original, so any tool loads it. It
        computes with the ghosts, and with the model's own frequencies where the plan has slots,
        unless the plan is applied (``gainlens.slim``, ``gainlens.ablate``).

        Args:
            folder: a new or empty folder. It is written under another name and then renamed.
            tokenizer: a transformers tokenizer; by default that of the model.
            facts: additional entries for ``training.json``, such as verdicts.
            files: additional files to copy into the folder, by name.

        Returns:
            The folder.

        Raises:
            InputError: the folder is not empty or not writable.
            UnsupportedModelError: transformers has no such weight layout (a HookedTransformer, a
                bridge of GPT-2 or GPT-NeoX).
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

    def _display(self) -> Display:
        return Display("Rise of the loss against training tokens")


def row_digests(rows: Iterable[Int[torch.Tensor, " _"]]) -> set[str]:
    """A short digest of each document's tokens."""
    return {row_hash(row)[:16] for row in rows}
