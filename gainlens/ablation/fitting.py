"""Fit the maps of every head of a model to recorded attention, each judged on held-out text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.least_squares import Maps, Part, Problem, fit_rounds, misfit
from gainlens.ablation.recorded_attention import Attention, RecordedAttention, Seen
from gainlens.data.batches import Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.overlap import document_identities
from gainlens.errors import InputError
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.rotation import Turn
from gainlens.model.tokens import model_documents

QUERIES = 4096
"""Query positions of a head that are fitted, at most; they are spread over the whole text."""

TOKENS_PER_DIMENSION = 64
"""Tokens of calibration text per dimension of a head below which a fit is warned about: heads of 64
dimensions fit well on some 4,000, and one of 256 was worse than plain selection on 768."""

AMPLE = 64
"""Queries of a head's group, and tokens, per dimension beyond which the smallest ridge is tried
first."""

PART_SIZE = 1 << 18
"""Logits of a part that holds more than one document, at most."""

RIDGES = (1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Settings:
    """How maps are fitted; see ``gainlens.refit``.

    Raises:
        InputError: one that is out of range.
    """

    rounds: int = 6
    iterations: int = 6
    ridge: float | Sequence[float] = RIDGES
    uniform: float = 0.2
    stride: int | None = None
    passes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.uniform < 1:
            raise InputError(f"uniform={self.uniform!r} is outside 0..1")
        counts = {
            name: getattr(self, name) for name in ("rounds", "iterations", "stride", "passes")
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value!r}: expected at least 1")
        if not self.ridges or not all(0 <= r < float("inf") for r in self.ridges):
            raise InputError(f"ridge={self.ridge!r}: expected finite numbers of 0 or above")

    @property
    def ridges(self) -> tuple[float, ...]:
        """The ridges that are tried, in order."""
        one = isinstance(self.ridge, int | float)
        return (float(self.ridge),) if one else tuple(self.ridge)  # type: ignore[arg-type]

    def spacing(self, lengths: Sequence[int]) -> int:
        """Every how many positions a query is fitted."""
        if self.stride is not None:
            return min(self.stride, max(lengths))
        return max(2, -(-sum(lengths) // QUERIES))


def calibration(model: Any, tokens: Tokens, d_head: int) -> list[Int[torch.Tensor, " _"]]:
    """The documents, with a warning where they are too few for a fit.

    Raises:
        InputError: see ``gainlens.data.batches``.
    """
    documents = model_documents(model, tokens)
    n_tokens, wanted = sum(map(len, documents)), TOKENS_PER_DIMENSION * d_head
    if n_tokens < wanted:
        warnings.warn(
            f"tokens holds {n_tokens} tokens: a fit of heads with {d_head} dimensions takes some "
            f"{wanted} or more, and may be worse than no fit on fewer",
            stacklevel=3,
        )
    return documents


def text_facts(model: Any, documents: list[Int[torch.Tensor, " _"]]) -> dict[str, Any]:
    """Which model and text a cut was fitted on."""
    return {
        "fingerprint": model_fingerprint(model),
        "text": text_fingerprint(documents),
        "documents": list(document_identities(documents, getattr(model, "tokenizer", None))),
        "n_documents": len(documents),
        "n_tokens": sum(map(len, documents)),
        "longest": max(map(len, documents)),
    }


class Choice(NamedTuple):
    """What held-out text chose for a head.

    Attributes:
        ridge: of the fit.
        rounds: of the fit; 0 where the start stayed.
        shared: whether the query heads of the group have one map.
    """

    ridge: float
    rounds: int
    shared: bool


@dataclass
class Fitted:
    """What ``fit_heads`` found.

    Attributes:
        queries, keys: maps of all heads, zero rows for what is cut.
        misfits: per key head, before and after: on all text, then on held-out text by the fit to
            the other half.
        chosen: per key head.
    """

    queries: Float[torch.Tensor, "layer head d_head d_head2"]
    keys: Float[torch.Tensor, "layer kv_head d_head d_head2"]
    misfits: list[tuple[float, float, float, float]] = field(default_factory=list)
    chosen: list[Choice] = field(default_factory=list)

    def facts(self, settings: Settings, stride: int) -> dict[str, Any]:
        """Settings and misfits (about nats of Kullback-Leibler divergence per query), for files."""
        n = max(1, len(self.misfits))
        means = [sum(m[i] for m in self.misfits) / n for i in range(4)]
        return {
            "rounds": settings.rounds,
            "iterations": settings.iterations,
            "ridge": list(settings.ridges),
            "uniform": settings.uniform,
            "stride": stride,
            "passes": settings.passes,
            "misfit_before": means[0],
            "misfit_after": means[1],
            "held_out_before": means[2],
            "held_out_after": means[3],
            "heads_unfitted": sum(c.rounds == 0 for c in self.chosen),
            "heads_with_one_query_map": sum(c.shared and c.rounds > 0 for c in self.chosen),
            "ridges_chosen": {
                f"{ridge:g}": sum(c.ridge == ridge and c.rounds > 0 for c in self.chosen)
                for ridge in settings.ridges
            },
        }


def fit_heads(
    record: RecordedAttention,
    keep: Bool[torch.Tensor, "layer kv_head d_head"],
    frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"] | None,
    start: Callable[[int, int], Maps],
    settings: Settings,
    progress: bool,
    name: str,
    given: RecordedAttention | None = None,
) -> Fitted:
    """Fit every head by itself.

    Args:
        record: of the intact model.
        keep: dimensions that stay, whole pairs.
        frequencies: that the kept pairs turn by, radians per token; None for the model's own.
        start: from layer and key head to the maps to begin with.
        settings: of the fit.
        progress: show a progress bar over layers.
        name: of that bar.
        given: queries and keys that the maps act on, where they are not those of the intact model.
    """
    sites = record.sites
    d, group = sites.d_head, sites.group_size
    found = Fitted(
        torch.zeros(sites.n_layers, sites.n_heads, d, d, dtype=torch.float32),
        torch.zeros(sites.n_layers, sites.n_kv_heads, d, d, dtype=torch.float32),
    )
    for layer in tqdm(range(sites.n_layers), desc=name, unit="layer", disable=not progress):
        seen = list(record.layer(layer))
        acted_on = seen if given is None else list(given.layer(layer))
        for head in range(sites.n_kv_heads):
            kept = keep[layer, head].nonzero()[:, 0]
            if len(kept) == 0:
                continue
            chosen_turns = None if frequencies is None else frequencies[layer, head]
            turn = partial(kept_turn, record, layer, kept, chosen_turns)
            scale = record.attention[layer].scale
            fits, judges = (
                Problem(head_parts(record, layer, head, *some, settings.uniform, turn), scale)
                for some in zip(in_halves(seen), in_halves(acted_on), strict=True)
            )
            first = start(layer, head)
            maps, chosen, held_out = fit_held_out(fits, judges, first, settings)
            problem = together(fits, judges)
            found.chosen.append(chosen)
            found.misfits.append((misfit(problem, first), misfit(problem, maps), *held_out))
            rows = slice(head * group, (head + 1) * group)
            found.queries[layer][rows][:, kept] = maps[0]
            found.keys[layer, head][kept] = maps[1]
    return found


def in_halves(seen: list[Seen]) -> tuple[list[Seen], list[Seen]]:
    """Half of the documents, and the rest; of a single document every other run of queries.

    The halves are drawn: where several texts take turns, every other document is one of the texts,
    and what fits the other would be judged on it.
    """
    if len(seen) > 1:
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0)).tolist()
        return [seen[i] for i in sorted(order[0::2])], [seen[i] for i in sorted(order[1::2])]
    queries, keys, at = seen[0]
    side = torch.arange(len(at)) * 4 // max(1, len(at)) % 2
    first, second = ([(queries[side == n], keys, at[side == n])] for n in (0, 1))
    return first, second if len(at) > 1 else first


def together(a: Problem, b: Problem) -> Problem:
    """One problem of the text of both."""
    return Problem([*a.parts, *b.parts], a.scale)


def fit_held_out(
    fits: Problem, judges: Problem, start: Maps, settings: Settings
) -> tuple[Maps, Choice, tuple[float, float]]:
    """The maps fitted to all text, by the settings that one half chose for the other.

    On ample text the smallest ridge comes first, otherwise the one in the middle, where one query
    map for the group is tried against one for each of its heads. Then come larger or smaller ridges
    as long as they help, each for one round. The best goes on, as long as further rounds help.

    Returns:
        The maps (``start`` where no fit was better), the choice, and the misfit of the second half
        before and after a fit to the first.
    """
    plain = misfit(judges, start)
    ridges = sorted(settings.ridges)
    ample = _ample(fits, start)
    first = 0 if ample else len(ridges) // 2
    running: dict[tuple[float, bool], Iterator[Maps]] = {}
    errors: dict[tuple[float, bool], float] = {}

    def rounds_of(problem: Problem, ridge: float, shared: bool, rounds: int) -> Iterator[Maps]:
        n = settings.iterations
        return fit_rounds(problem, start, rounds=rounds, iterations=n, ridge=ridge, shared=shared)

    def tried(ridge: float, shared: bool) -> float:
        running[ridge, shared] = rounds_of(fits, ridge, shared, settings.rounds)
        errors[ridge, shared] = misfit(judges, next(running[ridge, shared]))
        return errors[ridge, shared]

    ways = (False, True) if len(start[0]) > 1 and not ample else (False,)
    shared = min(ways, key=lambda way: tried(ridges[first], way))
    for side in (ridges[first + 1 :], ridges[:first][::-1]):
        before = errors[ridges[first], shared]
        helped = False
        for ridge in side:
            error = tried(ridge, shared)
            if error > before:
                break
            before, helped = error, True
        if helped:  # the other side is worse then
            break
    ridge, shared = min(errors, key=errors.__getitem__)
    best, rounds = errors[ridge, shared], 1
    for n, maps in enumerate(running[ridge, shared], 2):
        error = misfit(judges, maps)
        if error >= best:
            break
        best, rounds = error, n
    if best >= plain:
        return start, Choice(ridge, 0, False), (plain, plain)
    fitted = rounds_of(together(fits, judges), ridge, shared, rounds)
    return list(fitted)[-1], Choice(ridge, rounds, shared), (plain, best)


def _ample(problem: Problem, start: Maps) -> bool:
    """Whether there are queries enough for a fit that is hardly held back."""
    n_queries = sum(part.at.numel() for part in problem.parts)
    n_tokens = sum(part.keys.shape[0] * part.keys.shape[1] for part in problem.parts)
    return min(n_queries * len(start[0]), n_tokens) >= AMPLE * start[1].shape[-1]


def head_parts(
    record: RecordedAttention,
    layer: int,
    head: int,
    seen: list[Seen],
    given: list[Seen],
    uniform: float,
    turn: Callable[[int], Turn],
) -> list[Part]:
    """The documents as one key head sees them.

    Args:
        record: of the intact model.
        layer, head: which key head.
        seen: what ``record.layer(layer)`` gives: the logits to fit.
        given: the queries and keys that the maps act on, of the same documents and positions.
        uniform: share of the weights that is spread evenly over the visible keys.
        turn: from a document's length to the rotation of what is kept, at its positions.
    """
    sites, attention = record.sites, record.attention[layer]
    rows = slice(head * sites.group_size, (head + 1) * sites.group_size)
    found = []
    runs = zip(_alike(seen, sites.group_size), _alike(given, sites.group_size), strict=True)
    for some, others in runs:
        q, k, at = _stacked(some, rows, head)
        logits, weights, slope = weighted_logits(attention, q, k, at, uniform)
        own, kept = record.turn(layer, k.shape[1]), turn(k.shape[1])
        if given is not seen:
            q, k, at = _stacked(others, rows, head)
        plain = own.at(at)(q, inverse=True), own(k, inverse=True)
        found.append(Part(*plain, at, logits, weights, kept, slope))
    return found


def _stacked(
    some: list[Seen], rows: slice, head: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[group, doc, query_pos, d_head]``, keys and positions of a key head."""
    return (
        torch.stack([queries[:, rows].transpose(0, 1) for queries, _, _ in some], 1),
        torch.stack([keys[:, head] for _, keys, _ in some]),
        torch.stack([at for _, _, at in some]),
    )


def kept_turn(
    record: RecordedAttention,
    layer: int,
    kept: Int[torch.Tensor, " kept"],
    frequencies: Float[torch.Tensor, " rotary_pair"] | None,
    n_pos: int,
) -> Turn:
    """The rotation of kept dimensions in a document: the model's own, or by other frequencies."""
    own = record.turn(layer, n_pos)
    if frequencies is None:
        return own.of(kept)
    positions = torch.arange(n_pos)
    return Turn.of_frequencies(frequencies, own.partner, positions).sized(own).of(kept)


def _alike(seen: list[Seen], group: int) -> list[list[Seen]]:
    """Runs of short documents of one shape: fewer and larger products, still within the caches."""
    found: list[list[Seen]] = []
    for item in seen:
        n_queries, n_keys = len(item[0]), len(item[1])
        last = found[-1] if found else []
        if (
            last
            and (len(last[0][0]), len(last[0][1])) == (n_queries, n_keys)
            and (len(last) + 1) * group * n_queries * n_keys <= PART_SIZE
        ):
            last.append(item)
        else:
            found.append([item])
    return found


def weighted_logits(
    attention: Attention,
    queries: Float[torch.Tensor, "group doc query_pos d_head"],
    keys: Float[torch.Tensor, "doc key_pos d_head"],
    at: Int[torch.Tensor, "doc query_pos"],
    uniform: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits, weights and slopes of a ``Part`` from rotated queries and keys."""
    seen = attention.visible(at, keys.shape[1])
    logits = attention.scale * queries @ keys.mT
    weights = attention.pattern(logits, seen)
    even = seen.to(weights)
    weights = (1 - uniform) * weights + uniform * even / even.sum(-1, keepdim=True)
    slope = None
    if attention.soft_cap is not None:
        slope = 1 - torch.tanh(logits / attention.soft_cap).square()
    return logits, weights, slope
