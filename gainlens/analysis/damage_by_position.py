"""How much a cut costs near the start of a text and far into it: rise of the loss by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.analysis.buckets import (
    Bucket,
    buckets_up_to,
    mean_and_interval,
    named_cuts,
    plain,
    text_for,
)
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.texts import domains_of, groups_for
from gainlens.errors import InputError
from gainlens.files import FORMAT
from gainlens.frames import data_frame
from gainlens.plots.notebook import Display, Displayed
from gainlens.stats.loss_rise import rise_verdict
from gainlens.stats.verdicts import Context, Verdict

BUCKETS = (0, 64, 256, 1024, 4096)
"""Positions at which buckets begin."""

Losses = Callable[[torch.Tensor], torch.Tensor]
"""Next-token losses ``[document, pos - 1]`` of documents ``[document, pos]``, nats."""


@dataclass(frozen=True, eq=False)
class PositionRise(Displayed):
    """Rise of the loss by position in the text, of one cut or several on the same documents.

    A position is that of the token from which the next one is predicted: at position p the model
    has read p + 1 tokens.

    Attributes:
        cuts: names.
        fractions: share of key dimensions that each cuts.
        buckets: first and last position of each bucket, both included.
        rise: mean rise over a document's tokens in a bucket, nats per token,
            ``[cut, bucket, document]``; NaN where the document ends before it.
        n_tokens: predicted tokens in each bucket, all documents together.
        lengths: tokens of each document.
        groups: a number per document, the same for windows of one text.
        text: fingerprint of the text.
    """

    cuts: tuple[str, ...]
    fractions: tuple[float, ...]
    buckets: tuple[Bucket, ...]
    rise: Float[np.ndarray, "cut bucket document"]
    n_tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    text: str

    def __repr__(self) -> str:
        said = []
        for name in self.cuts:
            means = [r["rise"] for r in self.table() if r["cut"] == name]
            said.append(f"{name}: " + ", ".join(f"{mean:+.3f}" for mean in means))
        places = ", ".join(f"{a}–{b}" for a, b in self.buckets)
        return (
            f"PositionRise({'; '.join(said)} nats at positions {places}; "
            f"{len(set(self.groups))} documents)"
        )

    def lines(self) -> list[str]:
        """One line per cut: the rise in every bucket, in nats per token."""
        found: dict[str, list[str]] = {name: [] for name in self.cuts}
        for row in self.table():
            place = f"{row['first']:,}–{row['last']:,}"
            found[row["cut"]].append(f"{place} {row['rise']:+.4f}")
        return [f"{name}: {', '.join(said)} nats" for name, said in found.items()]

    @property
    def context(self) -> Context:
        """Positions and distances that the text has."""
        return Context.of(self.lengths)

    def table(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One row per cut and bucket; ``rise`` and its interval in nats per token.

        The mean is over the documents that reach the bucket, each weighing the same; the
        bootstrap-t interval at ``level`` draws windows of one text together, and ``n_documents``
        counts them as one.
        """
        rows = []
        for c, name in enumerate(self.cuts):
            for b, (first, last) in enumerate(self.buckets):
                mean, interval, n = mean_and_interval(self.rise[c, b], self.groups, level)
                rows.append(
                    {
                        "cut": name,
                        "fraction": self.fractions[c],
                        "first": first,
                        "last": last,
                        "rise": mean,
                        "interval": interval,
                        "n_documents": n,
                        "n_tokens": self.n_tokens[b],
                    }
                )
        return rows

    def to_dataframe(self) -> Any:
        """The rows of ``table``; the 95% interval as ``low`` and ``high``, nats per token.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def to_json(self) -> dict[str, Any]:
        """Plain values: the rows of ``table``, and the rise of each document."""
        return {
            "format": FORMAT,
            "kind": "rise by position",
            "text": self.text,
            "lengths": list(self.lengths),
            "groups": list(self.groups),
            "rows": [{**r, "interval": [plain(x) for x in r["interval"]]} for r in self.table()],
            "rise": [[[plain(x) for x in row] for row in cut] for cut in self.rise.tolist()],
        }

    def plot(self, ax: Any = None) -> Any:
        """Rise of the loss over positions, a line per cut, with 95% intervals; shows nothing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.
        """
        from gainlens.plots.curves import plot_rise_by_position

        return plot_rise_by_position(self, ax)

    def _display(self) -> Display:
        from gainlens.plots.markup.results import position_chart

        return Display(
            "Rise of the loss in nats per token against the position in the text, with 95% "
            f"intervals, for: {', '.join(self.cuts)}.",
            lambda alt: position_chart(self, alt),
        )


def rise_by_position(
    model: Any,
    tokens: Tokens,
    cuts: Cut | Mapping[str, Cut],
    *,
    buckets: Sequence[int] = BUCKETS,
    groups: Sequence[int] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> PositionRise:
    """Rise of the loss by position in the text.

    A mean over whole documents hides what a cut costs far from their start. Documents may be of
    unequal lengths; each counts in the buckets that it reaches. One document (or as many as fit
    ``tokens_per_batch``) is run at a time and nothing but a loss per token is kept, so memory does
    not grow with the text. Through the fast copy it grows with the longest document in proportion;
    where hooks do the work, attention patterns take ``head × length²`` numbers.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text, other than what chose the cuts.
        cuts: one, or several by name.
        buckets: the position at which each bucket begins, rising from 0; the last ends with the
            longest document, and those that no document reaches are left out.
        groups: as for ``gainlens.surgery``.
        tokens_per_batch: upper bound on tokens per forward pass; a longer document is run alone.
        evaluator: of this model, where several calls share one.
        progress: show a progress bar.

    Raises:
        InputError: no cut, one of another model's shape, text that also chose one, buckets that
            don't rise from 0, a loss that is not finite.

    Example:
        >>> mask = gl.KeyMask.quietest(gains, fraction=0.5, score="qk")
        >>> gl.analysis.rise_by_position(model, validation, mask).table()[0]["rise"]
    """
    named = named_cuts(cuts)
    evaluator = evaluator_of(model, evaluator)
    buckets_up_to("buckets", buckets, 0)
    text, _ = text_for(evaluator, tokens, named, tokens_per_batch, "rise_by_position")
    return position_rise(
        text.documents,
        {
            name: (1 - cut.fraction_kept, partial(evaluator.tokens, cut=cut))
            for name, cut in named.items()
        },
        evaluator.tokens,
        buckets=buckets,
        groups=groups_for(tokens, groups, sum(text.sizes)),
        text=text.text,
        progress=progress,
    )


def judge_by_position(
    tokens: Tokens,
    runs: Sequence[Int[torch.Tensor, "_ _"]],
    losses: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    fraction: float | None,
    margin: float,
    *,
    name: str,
    trained: bool = False,
    buckets: Sequence[int] = BUCKETS,
    groups: Sequence[int] | None = None,
) -> tuple[Verdict, PositionRise]:
    """The verdict on the rise of the loss, and the rise by position, from losses per token.

    Args:
        tokens: the text, which knows its domains and groups if ``load_tokens`` made it.
        runs: its documents as batches.
        losses: per run, of the cut model and of the intact one.
        fraction, margin, trained: as for ``gainlens.stats.loss_rise.rise_verdict``.
        name: of the cut model.
        buckets: as for ``rise_by_position``.
        groups: as for ``gainlens.surgery``.

    Raises:
        InputError: buckets that don't rise from 0, a loss that is not finite, groups that are not
            one per document.
    """
    documents = [row for run in runs for row in run]
    labels = groups_for(tokens, groups, len(documents))
    rise = position_rise(
        runs,
        {name: (fraction or 0.0, in_order(losses[0]))},
        in_order(losses[1]),
        buckets=buckets,
        groups=labels,
        text=text_fingerprint(documents),
        progress=False,
    )
    after, before = (torch.cat([x.double().mean(1) for x in some]).numpy() for some in losses)
    verdict = rise_verdict(
        after - before,
        fraction,
        margin,
        trained=trained,
        domains=domains_of(tokens) or (),
        lengths=[len(row) for row in documents],
        groups=labels or None,
    )
    return verdict, rise


def in_order(losses: Sequence[torch.Tensor]) -> Losses:
    """Losses that were computed before, one batch at a time in the order of the batches."""
    left = iter(losses)
    return lambda batch: next(left)


def position_rise(
    batches: Sequence[Int[torch.Tensor, "_ _"]],
    cuts: Mapping[str, tuple[float, Losses]],
    intact: Losses,
    *,
    buckets: Sequence[int] = BUCKETS,
    groups: Sequence[int] = (),
    text: str = "",
    progress: bool = True,
) -> PositionRise:
    """Rise by position from functions that give a loss per token.

    Args:
        batches: documents of one length each.
        cuts: by name, the share cut and the losses with the cut.
        intact: losses without.
        buckets, progress: as for ``rise_by_position``.
        groups: a number per document; empty if all are independent.
        text: fingerprint of the text.

    Raises:
        InputError: buckets that don't rise from 0, a loss that is not finite.
    """
    lengths = tuple(len(row) for batch in batches for row in batch)
    # The last token predicts nothing.
    ends = [length - 1 for length in lengths]
    found = buckets_up_to("buckets", buckets, max(ends) - 1)
    rise = np.full((len(cuts), len(found), len(ends)), np.nan)
    done = 0
    with tqdm(total=len(ends), desc="positions", unit="doc", disable=not progress) as bar:
        for batch in batches:
            before = intact(batch).double().numpy()
            rows = slice(done, done + len(batch))
            for c, (_, losses) in enumerate(cuts.values()):
                risen = losses(batch).double().numpy() - before
                if not np.isfinite(risen).all():
                    raise InputError(
                        "a loss is not finite; expected weights without NaN or infinity"
                    )
                for b, (first, last) in enumerate(found):
                    if first < risen.shape[1]:
                        rise[c, b, rows] = risen[:, first : last + 1].mean(1)
            done += len(batch)
            bar.update(len(batch))
    counts = [sum(max(0, min(end, last + 1) - first) for end in ends) for first, last in found]
    return PositionRise(
        tuple(cuts),
        tuple(fraction for fraction, _ in cuts.values()),
        found,
        rise,
        tuple(counts),
        lengths,
        tuple(groups) or tuple(range(len(lengths))),
        text,
    )
