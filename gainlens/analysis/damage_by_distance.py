"""Which distances between query and key a cut damages, and the wavelengths of what was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.analysis.attention_by_layer import (
    causal_attention,
    hand_over_attention,
    query_chunks,
)
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
from gainlens.files import FORMAT
from gainlens.frames import data_frame
from gainlens.model.fast_copy import Edit
from gainlens.model.sites import KeySites
from gainlens.plots.notebook import Display, Displayed
from gainlens.stats.verdicts import Context


@dataclass(frozen=True, eq=False)
class DistanceChange(Displayed):
    """Attention by distance between query and key, and what cuts change there.

    All means are over the queries that see a key in the bucket, then over the documents that have
    such queries. Each layer gets the queries and keys of the intact model: a change is what the
    cut does in that layer, not what earlier layers hand on.

    Attributes:
        cuts: names.
        fractions: share of key dimensions that each cuts.
        buckets: least and largest distance of each bucket in tokens, both included; 0 is a
            token's attention to itself.
        attention: attention that a query of the intact model puts on all keys in a bucket
            together, 0 to 1, ``[layer, head, bucket]``.
        after: the same with the cut, ``[cut, layer, head, bucket]``.
        change: absolute change of attention, summed over the keys in a bucket, 0 to 2,
            ``[cut, layer, head, bucket]``.
        by_document: mean over layers and heads of ``change``, ``[cut, bucket, document]``; NaN
            where a document has no such distance.
        n_queries: queries that see a key in the bucket, per layer and head, all documents.
        wavelengths: of the rotary pairs, in tokens, rising; infinite for pairs that don't turn
            and dimensions without a partner.
        pairs: how many there are at each wavelength, over layers and key heads.
        cut_pairs: how many lose a dimension or both, ``[cut, wavelength]``.
        lengths: tokens of each document.
        groups: a number per document, the same for windows of one text.
        text: fingerprint of the text.
    """

    cuts: tuple[str, ...]
    fractions: tuple[float, ...]
    buckets: tuple[Bucket, ...]
    attention: Float[np.ndarray, "layer head bucket"]
    after: Float[np.ndarray, "cut layer head bucket"]
    change: Float[np.ndarray, "cut layer head bucket"]
    by_document: Float[np.ndarray, "cut bucket document"]
    n_queries: tuple[int, ...]
    wavelengths: Float[np.ndarray, " wavelength"]
    pairs: Int[np.ndarray, " wavelength"]
    cut_pairs: Int[np.ndarray, "cut wavelength"]
    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    text: str

    def __repr__(self) -> str:
        said = []
        for c, name in enumerate(self.cuts):
            curve = self.change[c].mean((0, 1))
            first, last = self.buckets[int(curve.argmax())]
            said.append(f"{name}: up to {curve.max():.3f} of attention at distances {first}–{last}")
        return f"DistanceChange({'; '.join(said)}; {len(set(self.groups))} documents)"

    @property
    def context(self) -> Context:
        """Positions and distances that the text has."""
        return Context.of(self.lengths)

    def table(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One row per cut and bucket of distances, means over layers and heads.

        ``attention`` and ``after`` are shares of a query's attention; ``change`` is the absolute
        change summed over the bucket's keys, with its bootstrap-t interval at ``level`` over
        documents (windows of one text are drawn together and count as one); ``relative`` is it
        over ``attention``. ``cut_pairs`` of ``pairs`` have a wavelength in the bucket.
        """
        rows = []
        for c, name in enumerate(self.cuts):
            for b, (first, last) in enumerate(self.buckets):
                mean, interval, n = mean_and_interval(self.by_document[c, b], self.groups, level)
                attention = float(self.attention[..., b].mean())
                there = (self.wavelengths >= first) & (self.wavelengths < last + 1)
                rows.append(
                    {
                        "cut": name,
                        "fraction": self.fractions[c],
                        "first": first,
                        "last": last,
                        "attention": attention,
                        "after": float(self.after[c, ..., b].mean()),
                        "change": mean,
                        "interval": interval,
                        "relative": mean / attention if attention else 0.0,
                        "n_documents": n,
                        "n_queries": self.n_queries[b],
                        "pairs": int(self.pairs[there].sum()),
                        "cut_pairs": int(self.cut_pairs[c, there].sum()),
                    }
                )
        return rows

    def wavelength_table(self) -> list[dict[str, Any]]:
        """One row per cut and wavelength in tokens: how many pairs there are, and how many cut."""
        return [
            {
                "cut": name,
                "wavelength": float(wavelength),
                "pairs": int(self.pairs[w]),
                "cut_pairs": int(self.cut_pairs[c, w]),
            }
            for c, name in enumerate(self.cuts)
            for w, wavelength in enumerate(self.wavelengths)
        ]

    def to_dataframe(self) -> Any:
        """The rows of ``table``; the 95% interval as ``low`` and ``high``.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def to_json(self) -> dict[str, Any]:
        """Plain values: the rows of both tables, and each layer's and head's figures."""
        pairs = self.wavelength_table()
        return {
            "format": FORMAT,
            "kind": "change by distance",
            "text": self.text,
            "lengths": list(self.lengths),
            "groups": list(self.groups),
            "rows": [{**r, "interval": [plain(x) for x in r["interval"]]} for r in self.table()],
            "wavelengths": [{**row, "wavelength": plain(row["wavelength"])} for row in pairs],
            "attention": self.attention.tolist(),
            "after": self.after.tolist(),
            "change": self.change.tolist(),
        }

    def plot(self, ax: Any = None) -> Any:
        """Change of attention over distance, a line per cut, above the share of pairs cut at each
        wavelength; shows nothing.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.
        """
        from gainlens.plots.curves import plot_change_by_distance

        return plot_change_by_distance(self, ax)

    def _display(self) -> Display:
        from gainlens.plots.markup.results import distance_charts

        return Display(
            "Absolute change of attention against the distance between query and key, and the "
            f"share of rotary pairs cut at each wavelength, for: {', '.join(self.cuts)}.",
            lambda alt: "".join(distance_charts(self, alt)),
        )


def change_by_distance(
    model: Any,
    tokens: Tokens,
    cuts: Cut | Mapping[str, Cut],
    *,
    edges: Sequence[int] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> DistanceChange:
    """How much a cut changes attention at each distance between query and key.

    In every layer the cut acts on the queries and keys of the intact model. Attention is computed
    for a few queries at a time, so memory grows with the longest document in proportion (through
    the fast copy; where hooks do the work, the model holds ``head × length²`` attention weights).

    Args:
        model: a TransformerBridge or HookedTransformer with causal attention.
        tokens: validation text, other than what chose the cuts; documents of any length.
        cuts: one, or several by name; ablations at stage ``rotated``.
        edges: the distance in tokens at which each bucket begins, rising from 0; by default 0, 1,
            2, 4, 8, … The last bucket ends with the longest document.
        tokens_per_batch: upper bound on tokens per forward pass; a longer document is run alone.
        evaluator: of this model, where several calls share one.
        progress: show a progress bar.

    Raises:
        InputError: no cut, one of another model's shape, text that also chose one, edges that
            don't rise from 0.
        UnsupportedModelError: attention that is more than causal with one scale (soft cap,
            window, position bias).

    Example:
        >>> mask = gl.KeyMask.quietest(gains, fraction=0.5, score="qk")
        >>> change = gl.analysis.change_by_distance(model, validation, mask)
        >>> change.table()[0]["change"], change.wavelength_table()[0]["cut_pairs"]
    """
    named = named_cuts(cuts)
    evaluator = evaluator_of(model, evaluator)
    if edges is not None:
        buckets_up_to("edges", edges, 0)
    text, groups = text_for(evaluator, tokens, named, tokens_per_batch, "change_by_distance")
    last = max(text.lengths) - 1
    doubling = [0, *(1 << n for n in range(last.bit_length()))]
    buckets = buckets_up_to("edges", doubling if edges is None else edges, last)
    sites = evaluator.sites
    sums = _Sums(sites, len(named), buckets)
    with tqdm(total=sum(text.sizes), desc="distances", unit="doc", disable=not progress) as bar:
        for batch in text.documents:
            edits = [cut.edit(model, batch) for cut in named.values()]
            hand_over_attention(evaluator, batch, sums.receiver(batch, edits))
            bar.update(len(batch))
    wavelengths, pairs, cut_pairs = pairs_by_wavelength(sites, list(named.values()))
    firsts = np.array([first for first, _ in buckets])
    lengths = np.array(text.lengths)
    documents = (lengths[:, None] > firsts).sum(0)
    whole = (sums.total / torch.from_numpy(documents)).numpy()
    return DistanceChange(
        tuple(named),
        tuple(1 - cut.fraction_kept for cut in named.values()),
        buckets,
        whole[0],
        whole[1 : 1 + len(named)],
        whole[1 + len(named) :],
        np.stack(sums.by_document, -1),
        tuple(int(n) for n in np.maximum(lengths[:, None] - firsts, 0).sum(0)),
        wavelengths,
        pairs,
        cut_pairs,
        text.lengths,
        groups,
        text.text,
    )


class _Sums:
    """Sums over documents of attention, attention after each cut, and each change, float64.

    Attributes:
        total: ``[1 + 2 · cuts, layer, head, bucket]``.
        by_document: per document the mean change over layers and heads, ``[cut, bucket]``.
    """

    def __init__(self, sites: KeySites, n_cuts: int, buckets: tuple[Bucket, ...]) -> None:
        self.sites, self.n_cuts, self.buckets = sites, n_cuts, buckets
        shape = (1 + 2 * n_cuts, sites.n_layers, sites.n_heads, len(buckets))
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.by_document: list[np.ndarray] = []

    def receiver(
        self, batch: torch.Tensor, edits: list[Edit]
    ) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
        """What takes the queries and keys of a batch, layer after layer."""
        firsts = torch.tensor([first for first, _ in self.buckets])
        queries = (batch.shape[1] - firsts).double()
        rows = [np.zeros((self.n_cuts, len(self.buckets))) for _ in batch]
        for row in rows:
            row[:, (queries <= 0).numpy()] = np.nan
        self.by_document += rows

        def receive(layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
            pairs = [(q, k), *(edit(q, k, layer) for edit in edits)]
            for n, row in enumerate(rows):
                one = [(x[n], y[n]) for x, y in pairs]
                means = self._document(one, layer) / queries.clamp_min(1)
                self.total[:, layer] += means
                row += means[1 + self.n_cuts :].mean(1).numpy() / self.sites.n_layers

        return receive

    def _document(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]], layer: int
    ) -> Float[torch.Tensor, "part head bucket"]:
        """Sums over one document's queries."""
        scale = self.sites.logit_scale[layer]
        parts = torch.zeros(len(self.total), self.sites.n_heads, len(self.buckets)).double()
        n_pos, n_heads, _ = pairs[0][0].shape
        for at in query_chunks(n_pos, n_heads):
            intact = causal_attention(*pairs[0], scale, at)
            parts[0] += by_distance(intact, at.start, self.buckets)
            for c, (q, k) in enumerate(pairs[1:], 1):
                cut = causal_attention(q, k, scale, at)
                parts[c] += by_distance(cut, at.start, self.buckets)
                parts[c + self.n_cuts] += by_distance(
                    cut.sub_(intact).abs_(), at.start, self.buckets
                )
        return parts


def by_distance(
    values: Float[torch.Tensor, "head chunk key_pos"], start: int, buckets: Sequence[Bucket]
) -> Float[torch.Tensor, "head bucket"]:
    """Sums over queries and keys at the distances of each bucket, float64 on the CPU.

    Args:
        values: zero for keys after the query.
        start: position of the first query.
        buckets: of distances, from 0 on.
    """
    running = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
    at = start + torch.arange(values.shape[1], device=values.device)[:, None]
    ends = torch.tensor([first for first, _ in buckets] + [buckets[-1][1] + 1]).to(at)
    # running[i - d + 1] is the sum over keys at distance d or more.
    places = (at - ends + 1).clamp_min(0).expand(len(values), -1, -1)
    from_on = running.gather(-1, places).sum(1)
    return (from_on[:, :-1] - from_on[:, 1:]).cpu()


def pairs_by_wavelength(
    sites: KeySites, cuts: Sequence[Cut]
) -> tuple[
    Float[np.ndarray, " wavelength"],
    Int[np.ndarray, " wavelength"],
    Int[np.ndarray, "cut wavelength"],
]:
    """How many pairs turn at each wavelength, and how many of them each cut takes from.

    Args:
        sites: of the model.
        cuts: of this model.

    Returns:
        Wavelengths in tokens, rising (those that agree to four digits are one; infinite for a
        pair that does not turn and for a dimension without a partner); pairs over all layers and
        key heads; pairs that lose a dimension or both.
    """
    units = torch.arange(sites.d_head)
    lower = units[sites.partner > units]
    alone = units[sites.partner == units]
    frequency = torch.zeros(sites.n_layers, len(lower) + len(alone), dtype=torch.float64)
    frequency[:, : len(lower)] = sites.frequencies.double().cpu()[:, : len(lower)]
    wavelength = (2 * np.pi / frequency).numpy()  # infinite where nothing turns
    named = np.array([float(f"{w:.4g}") for w in wavelength.ravel()])
    values, which = np.unique(named, return_inverse=True)
    first = torch.cat([lower, alone])
    lost = [~cut.keep[..., first] | ~cut.keep[..., sites.partner[first]] for cut in cuts]
    count = np.bincount(which, minlength=len(values)) * sites.n_kv_heads
    cut_count = [
        np.bincount(which, one.sum(1).numpy().ravel(), len(values)).round().astype(int)
        for one in lost
    ]
    return values, count, np.array(cut_count)
