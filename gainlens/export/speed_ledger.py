"""The ledger: what a slim model saves, counted, predicted and measured, in one engine and one run.

Decoding one token reads every weight and every cached key and value once, and prefill is bound by
arithmetic; so both ratios can be predicted from sizes alone and set beside the measured ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gainlens.environment import environment
from gainlens.errors import InputError
from gainlens.export import timing
from gainlens.export.attention import ATTENTION
from gainlens.export.modeling import SlimAttention, family_of, plan_of
from gainlens.export.timing import Contender

CONTEXTS = (512, 4096, 16384)


@dataclass(frozen=True)
class Sizes:
    """What a slim model holds and moves; an identity plan gives the full model's.

    Attributes:
        parameters: number of weights, tied ones once.
        weight_bytes: bytes of the weights that one token reads: all but the embedding rows of
            other tokens.
        key_bytes, value_bytes: cache bytes per token of context.
        flops: floating point operations per token without attention over the context.
        flops_per_position: more per position of context.
    """

    parameters: int
    weight_bytes: int
    key_bytes: int
    value_bytes: int
    flops: int
    flops_per_position: int


def sizes(slim: Any) -> Sizes:
    """Count; every layer of ``slim`` must be a ``SlimAttention``."""
    modules = [m for m in slim.modules() if isinstance(m, SlimAttention)]
    if not modules:
        raise InputError(f"slim={type(slim).__name__} is no slim model: expected that of slim()")
    element = next(slim.parameters()).element_size()
    parameters = sum(p.numel() for p in slim.parameters())
    embedding = slim.get_input_embeddings().weight
    tied = slim.get_output_embeddings().weight is embedding
    read = parameters - (0 if tied else embedding.numel())
    positions = sum(
        m.weight.numel() for n, m in slim.named_modules() if n.endswith("wpe")
    )  # learned positions: one row is read
    keys = sum(m.n_kv_heads * m.head_dim for m in modules)
    values = sum(m.n_kv_heads * m.value_dim for m in modules)
    per_position = sum(2 * m.n_heads * (m.head_dim + m.value_dim) for m in modules)
    return Sizes(
        parameters=parameters,
        weight_bytes=(read - positions) * element,
        key_bytes=keys * element,
        value_bytes=values * element,
        flops=2 * (read - positions),
        flops_per_position=per_position,
    )


def predict_decode(full: Any, slim: Any, context: int, batch: int = 1) -> float:
    """Tokens per second after over before when decoding is bound by the bytes that it reads."""

    def read(model: Any) -> int:
        s = sizes(model)
        return s.weight_bytes + batch * context * (s.key_bytes + s.value_bytes)

    return read(full) / read(slim)


def predict_prefill(full: Any, slim: Any, context: int) -> float:
    """The same for prefill bound by arithmetic; causal, so half of the positions on average."""

    def work(model: Any) -> float:
        s = sizes(model)
        return s.flops + s.flops_per_position * context / 2

    return work(full) / work(slim)


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
                "cache_bytes_full": batch * context * (before.key_bytes + before.value_bytes),
                "cache_bytes_slim": batch * context * (after.key_bytes + after.value_bytes),
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
    return {
        "model": family.model_class,
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
        "contexts": rows,
        "twice_as_fast": verdict_on_doubling(before, after, batch),
        **environment(),
    }


def verdict_on_doubling(before: Sizes, after: Sizes, batch: int) -> dict[str, Any]:
    """Where "potentially doubling inference speed" holds for decoding, by the bytes read.

    With c the context, the ratio is (W + b c K) / (W' + b c K'): at most K / K' however long the
    context, where K and K' are cache bytes per token before and after.
    """
    cache_before = before.key_bytes + before.value_bytes
    cache_after = after.key_bytes + after.value_bytes
    limit = cache_before / cache_after
    # W + bcK >= 2 (W' + bcK')  <=>  bc (K - 2K') >= 2W' - W
    gap = cache_before - 2 * cache_after
    need = 2 * after.weight_bytes - before.weight_bytes
    context = None if gap <= 0 else max(0, -(-need // (batch * gap)))
    share = before.key_bytes / cache_before
    # A quarter of keys and values: K' = K/4, and no more weights than this plan leaves.
    quarter = max(0, -(-2 * need // (batch * cache_before)))
    if gap > 0:
        claim = f"decoding doubles from {context} tokens of context on (batch {batch})"
    else:
        claim = (
            f"decoding can't double: keys are {share:.0%} of the cache, and with this plan it "
            f"shrinks to {1 / limit:.0%}, so the ratio stays below {limit:.2f} at any context; it "
            "would take more than half of the keys and of the values, and a context whose cache "
            f"outweighs the weights: with a quarter of both left, {quarter} tokens (batch {batch})"
        )
    return {
        "limit": limit,
        "from_context": context,
        "with_a_quarter_left_from_context": quarter,
        "verdict": claim,
    }


def _ratio(timed: dict[str, dict[str, float]], what: str, before: str) -> float:
    return timed["slim"][what] / timed[before][what]


def untouched(model: Any) -> Any:
    """A copy of a transformers model for ``ledger``'s baseline."""
    return copy.deepcopy(model).eval()
