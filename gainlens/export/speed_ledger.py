"""The ledger: what a slim model saves, counted, predicted and measured, in one engine and one run.

Decoding one token reads every weight and every cached key and value once, and prefill is bound by
arithmetic; so both ratios can be predicted from sizes alone and set beside the measured ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gainlens.environment import environment
from gainlens.errors import InputError
from gainlens.export import timing
from gainlens.export.after_norm import map_weights
from gainlens.export.attention import ATTENTION
from gainlens.export.family import WHOLE
from gainlens.export.modeling import family_of, plan_of
from gainlens.export.slim_attention import SlimAttention
from gainlens.export.timing import Contender
from gainlens.model.stored_weights import counted

CONTEXTS = (512, 4096, 16384)


@dataclass(frozen=True)
class Sizes:
    """What a slim model holds and moves; an identity plan gives the full model's.

    Attributes:
        parameters: number of weights, tied ones once.
        weight_bytes: bytes of the weights that one token reads: all but the embedding rows of
            other tokens.
        key_bytes, value_bytes: cache bytes per token of context, before any window is full.
        flops: floating point operations per token without attention over the context.
        flops_per_position: more per position of context, before any window is full.
        windows: of layers that see a window only: its length, and the part of ``key_bytes``,
            ``value_bytes`` and ``flops_per_position`` that stops growing there.
    """

    parameters: int
    weight_bytes: int
    key_bytes: int
    value_bytes: int
    flops: int
    flops_per_position: int
    windows: tuple[tuple[int, int, int, int], ...] = ()

    def cache_bytes(self, context: int) -> int:
        """Bytes of keys and values that one token reads after ``context`` tokens."""
        full = context * (self.key_bytes + self.value_bytes)
        return full - sum(max(0, context - w) * (k + v) for w, k, v, _ in self.windows)

    def prefill_flops(self, context: int) -> float:
        """Operations per token of a causal prefill: half of the positions on average."""
        attention = self.flops_per_position * context / 2
        for window, _, _, flops in self.windows:
            attention -= flops * max(0, context - window) ** 2 / (2 * max(1, context))
        return self.flops + attention


def sizes(slim: Any) -> Sizes:
    """Count; every layer of ``slim`` must be a ``SlimAttention``."""
    modules = [m for m in slim.modules() if isinstance(m, SlimAttention)]
    if not modules:
        raise InputError(f"slim={type(slim).__name__} is no slim model: expected that of slim()")
    element = next(slim.parameters()).element_size()
    parameters = sum(p.numel() for p in counted(slim))
    embedding, head = slim.get_input_embeddings().weight, slim.get_output_embeddings().weight
    tied = head is embedding or (head.is_meta and slim.config.tie_word_embeddings)
    read = parameters - (0 if tied else embedding.numel())
    positions = sum(
        m.weight.numel()
        for n, m in slim.named_modules()
        if n.endswith(("wpe", "embed_positions")) and hasattr(m, "weight")
    )  # learned positions: one row is read
    keys, values, per_position = _per_token(modules, element)
    lengths = sorted({w for m in modules if (w := m.sliding_window) is not None})
    windows = tuple(
        (length, *_per_token([m for m in modules if m.sliding_window == length], element))
        for length in lengths
    )
    return Sizes(
        parameters=parameters,
        weight_bytes=(read - positions) * element,
        key_bytes=keys,
        value_bytes=values,
        flops=2 * (read - positions),
        flops_per_position=per_position,
        windows=windows,
    )


def _per_token(modules: Sequence[SlimAttention], element: int) -> tuple[int, int, int]:
    """Bytes of keys and of values, and operations, for each position that layers see."""
    keys = sum(m.n_kv_heads * m.head_dim for m in modules) * element
    values = sum(m.n_kv_heads * m.value_dim for m in modules) * element
    return keys, values, sum(2 * m.n_heads * (m.head_dim + m.value_dim) for m in modules)


def predict_decode(full: Any, slim: Any, context: int, batch: int = 1) -> float:
    """Tokens per second after over before when decoding is bound by the bytes that it reads."""
    before, after = sizes(full), sizes(slim)
    return _read(before, context, batch) / _read(after, context, batch)


def _read(s: Sizes, context: int, batch: int) -> int:
    return s.weight_bytes + batch * s.cache_bytes(context)


def predict_prefill(full: Any, slim: Any, context: int) -> float:
    """The same for prefill bound by arithmetic."""
    return sizes(full).prefill_flops(context) / sizes(slim).prefill_flops(context)


def ledger(
    full: Any,
    slim: Any,
    *,
    baseline: Any | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    decode_tokens: int = 12,
    repeats: int = 3,
    measure: bool = True,
) -> dict[str, Any]:
    """Before and after, JSON-ready.

    Args:
        full: the model cut by ``SlicePlan.identity``, so that both run in the same engine.
        slim: the model cut by the plan in question.
        baseline: the untouched transformers model, timed under each of its attention settings.
        contexts: tokens in the cache when decoding, and in a prefill.
        batch: sequences at once.
        decode_tokens: steps whose median is taken.
        repeats: prefills whose best is taken (one above 4,096 tokens).
        measure: False for the counted and predicted figures alone.

    Raises:
        InputError: not slim models.
    """
    plan = plan_of(slim.config)
    before, after = sizes(full), sizes(slim)
    contenders = [Contender("full", full), Contender("slim", slim)]
    if baseline is not None:
        for setting in ("sdpa", "eager"):
            for cache in ("dynamic", "static"):
                name = f"transformers {setting}, {cache} cache"
                contenders.append(Contender(name, baseline, setting, cache == "static"))
    rows = []
    for context in contexts:
        row: dict[str, Any] = {
            "context": context,
            "predicted": {
                "decode_ratio": predict_decode(full, slim, context, batch),
                "prefill_ratio": predict_prefill(full, slim, context),
                "cache_bytes_full": batch * before.cache_bytes(context),
                "cache_bytes_slim": batch * after.cache_bytes(context),
            },
        }
        if measure:
            timed = timing.measure(contenders, context, batch, decode_tokens, repeats)
            row["measured"] = timed
            row["decode_ratio"] = _ratio(timed, "decode_tokens_per_second", "full")
            row["prefill_ratio"] = _ratio(timed, "prefill_tokens_per_second", "full")
            if baseline is not None:
                best = max(
                    (n for n in timed if n.startswith("transformers")),
                    key=lambda n: float(timed[n]["decode_tokens_per_second"]),
                )
                row["best_transformers"] = best
                row["decode_ratio_to_best_transformers"] = _ratio(
                    timed, "decode_tokens_per_second", best
                )
                row["prefill_ratio_to_best_transformers"] = timed["slim"][
                    "prefill_tokens_per_second"
                ] / max(
                    t.get("prefill_tokens_per_second", 0.0)
                    for n, t in timed.items()
                    if n.startswith("transformers")
                )
        rows.append(row)
    family = family_of(slim.config)
    saves = family.saves(slim.config)
    return {
        "model": family.model_class,
        "saves": saves,
        "why": WHOLE if saves == "cache alone" else None,
        "plan": {
            "keys_kept": plan.fraction_kept,
            "value_widths": plan.value_widths,
            "fingerprint": plan.fingerprint,
            "facts": plan.facts,
        },
        "engine": f"gainlens ({ATTENTION})",
        "batch": batch,
        "dtype": str(slim.dtype).removeprefix("torch."),
        "full": vars(before),
        "slim": vars(after),
        "saved": {
            "parameters": 1 - after.parameters / before.parameters,
            "key_cache": 1 - after.key_bytes / before.key_bytes,
            "kv_cache": 1
            - (after.key_bytes + after.value_bytes) / (before.key_bytes + before.value_bytes),
        },
        "map_weights": map_weights(slim),
        "contexts": rows,
        "twice_as_fast": verdict_on_doubling(before, after, batch),
        **environment(),
    }


def verdict_on_doubling(before: Sizes, after: Sizes, batch: int) -> dict[str, Any]:
    """Where "potentially doubling inference speed" holds for decoding, by the bytes read.

    With c the context, the ratio is (W + b K(c)) / (W' + b K'(c)), where K and K' are cache bytes
    before and after. Without windows K is proportional to c, and the ratio at most K / K' however
    long the context; layers with a window stop growing there, and count as the weights do.
    """
    far = max((w for w, *_ in before.windows), default=0)
    growth = [s.cache_bytes(far + 1) - s.cache_bytes(far) for s in (before, after)]
    # Where nothing grows any more, what is read after the longest window is read for ever.
    ends = growth if growth[0] else [_read(s, far, batch) for s in (before, after)]
    limit = ends[0] / ends[1]
    points = sorted({0, *(w for w, *_ in before.windows)})
    context = _from(lambda c: _read(before, c, batch) - 2 * _read(after, c, batch), points)
    share = before.key_bytes / (before.key_bytes + before.value_bytes)
    # A quarter of keys and values: K' = K/4, and no more weights than this plan leaves.
    need = 2 * (before.weight_bytes - 2 * after.weight_bytes)
    quarter = _from(lambda c: need + batch * before.cache_bytes(c), points)
    if context is not None:
        claim = f"decoding doubles from {context} tokens of context on (batch {batch})"
    else:
        claim = (
            f"decoding can't double: keys are {share:.0%} of the cache, and with this plan it "
            f"shrinks to {1 / limit:.0%}, so the ratio stays below {limit:.2f} at any context; it "
            "would take more than half of the keys and of the values, and a context whose cache "
            "outweighs the weights: with a quarter of both left, "
            + (
                f"{quarter} tokens"
                if quarter is not None
                else "no context, for its layers see windows"
            )
            + f" (batch {batch})"
        )
    return {
        "limit": limit,
        "from_context": context,
        "with_a_quarter_left_from_context": quarter,
        "verdict": claim,
    }


def _from(gain: Callable[[int], int], points: Sequence[int]) -> int | None:
    """The least context from which on ``gain`` stays at or above zero; None where there is none.

    Args:
        gain: of a context, linear between ``points`` and after the last.
        points: contexts in order, the first 0.
    """
    found = None
    for number, start in enumerate(reversed(points)):
        value, slope = gain(start), gain(start + 1) - gain(start)
        if number == 0 and (slope < 0 or (slope == 0 and value < 0)):
            return None
        if value < 0:
            return start - value // slope  # rounded up; what follows the segment holds
        found = start
    return found


def _ratio(timed: dict[str, dict[str, float]], what: str, before: str) -> float:
    return timed["slim"][what] / timed[before][what]


def untouched(model: Any) -> Any:
    """A copy of a transformers model for ``ledger``'s baseline."""
    return copy.deepcopy(model).eval()
