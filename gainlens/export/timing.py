"""Prefill and decoding of several models, in turns, so that a slower minute hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from gainlens.export.cache import GrowingLayer, use_growing_layer
from gainlens.model.text_config import text_config

EAGER_PREFILL = 4096
"""Eager attention holds a float per pair of positions and head: longer prefills aren't tried."""
WARM = 2
"""Decoding steps of each contender that are not counted."""


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: of the row.
        model: a transformers model.
        setting: its ``attn_implementation`` for this row; None leaves it as it is.
        static: decode from a ``StaticCache``; such a row has no prefill of its own.
    """

    name: str
    model: Any
    setting: str | None = None
    static: bool = False

    def ready(self) -> Any:
        """The model, with the row's attention."""
        if self.setting is not None and self.model.config._attn_implementation != self.setting:
            self.model.set_attn_implementation(self.setting)
        return self.model

    def prefills(self, context: int) -> bool:
        """Whether a prefill of this length is timed."""
        return not self.static and (self.setting != "eager" or context <= EAGER_PREFILL)


@torch.inference_mode()
def measure(
    contenders: Sequence[Contender], context: int, batch: int, decode_tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of each contender.

    Args:
        contenders: rows to time against each other.
        context: tokens of a prefill, and in the cache when decoding.
        batch: sequences at once.
        decode_tokens: steps whose median is taken.
        repeats: prefills whose best is taken (one above 4,096 tokens).

    Returns:
        Per name ``decode_tokens_per_second`` and, where it was timed,
        ``prefill_tokens_per_second``.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(text_config(contenders[0].model.config).vocab_size)
    room = context + decode_tokens + WARM
    tokens = torch.randint(0, vocabulary, (batch, room), generator=generator)
    prefill: dict[str, list[float]] = {c.name: [] for c in contenders if c.prefills(context)}
    decode: dict[str, list[float]] = {c.name: [] for c in contenders}
    turns = random.Random(0)
    order = list(contenders)

    for _ in range(repeats if context <= EAGER_PREFILL else 1):
        turns.shuffle(order)
        for one in order:
            if one.name in prefill:
                prefill[one.name].append(_prefill(one, tokens[:, :context]))

    caches = {c.name: _filled(c, tokens, context, room) for c in contenders}
    for step in range(decode_tokens + WARM):
        turns.shuffle(order)
        for one in order:
            model = one.ready()
            token = tokens[:, context + step : context + step + 1].to(model.device)
            start = time.perf_counter()
            model(token, past_key_values=caches[one.name], logits_to_keep=1)
            decode[one.name].append(time.perf_counter() - start)

    found = {}
    for name, seconds in decode.items():
        found[name] = {"decode_tokens_per_second": batch / statistics.median(seconds[WARM:])}
        if name in prefill:
            found[name]["prefill_tokens_per_second"] = batch * context / min(prefill[name])
    return found


def _prefill(one: Contender, tokens: Int[torch.Tensor, "batch pos"]) -> float:
    from transformers import DynamicCache

    model = one.ready()
    cache, tokens = DynamicCache(config=model.config), tokens.to(model.device)
    start = time.perf_counter()
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def _filled(one: Contender, tokens: Int[torch.Tensor, "batch pos"], context: int, room: int) -> Any:
    """A cache that holds ``context`` random positions: what they say costs no time."""
    from transformers import DynamicCache, StaticCache

    model = one.ready()
    generator = torch.Generator().manual_seed(0)
    shapes = DynamicCache(config=model.config)
    model(tokens[:, :1].to(model.device), past_key_values=shapes)
    cache: Any = DynamicCache(config=model.config)
    if one.static:
        cache = StaticCache(config=model.config, max_cache_len=room)
    for number, layer in enumerate(shapes.layers):
        if isinstance(layer, GrowingLayer):
            use_growing_layer(cache, number)
        filling = (
            torch.randn(*t.shape[:2], context, t.shape[3], generator=generator).to(t)
            for t in (layer.keys, layer.values)
        )
        cache.update(*filling, number)
    return cache
