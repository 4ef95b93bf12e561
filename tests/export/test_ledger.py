"""What a slim model saves: counted against its own tensors and caches, predicted, measured."""

from __future__ import annotations

import json

import pytest
import torch
from slim_families import CONFIGS, random_keep, shape_of
from transformers import DynamicCache

import gainlens as gl
from gainlens.ablation import KeyMask
from gainlens.export import SlicePlan, slim
from gainlens.export.attention import ATTENTION
from gainlens.export.slim_attention import SlimAttention
from gainlens.export.speed_ledger import (
    Sizes,
    ledger,
    predict_decode,
    sizes,
    verdict_on_doubling,
)
from gainlens.model.loading import load_hf

pytestmark = pytest.mark.one_env


@pytest.fixture(scope="module")
def pair(tiny_gains, tiny_calibration):
    model = load_hf("tiny")
    plan = SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.5), values=0.5)
    return slim(model, SlicePlan.identity(model)), slim(model, plan, tiny_calibration)


@pytest.mark.parametrize("which", [0, 1])
def test_bytes_are_those_of_the_tensors(pair, which):
    model = pair[which]
    found = sizes(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 10, dtype=torch.long), past_key_values=cache)
    for name in ("keys", "values"):
        held = sum(getattr(layer, name).nbytes for layer in cache.layers) / 10
        assert held == getattr(found, name.removesuffix("s") + "_bytes")


@pytest.mark.parametrize("which", [0, 1])
def test_operations_are_what_pytorch_counts(pair, which):
    """One token after a long context: matrix products of the weights and of the attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model, found, length = pair[which], sizes(pair[which]), 24
    model.set_attn_implementation("eager")
    try:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.ones(1, length - 1, dtype=torch.long), past_key_values=cache)
            with FlopCounterMode(display=False) as counter:
                model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    finally:
        model.set_attn_implementation(ATTENTION)
    predicted = found.flops + found.flops_per_position * length
    # Norms' weights are read and not multiplied as matrices: the only difference.
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == predicted - 2 * norms


def test_measured_beside_predicted_and_it_is_json(pair):
    full, thin = pair
    found = ledger(
        full, thin, baseline=load_hf("tiny"), contexts=(16, 48), decode_tokens=2, repeats=1
    )
    assert [row["context"] for row in found["contexts"]] == [16, 48]
    for row in found["contexts"]:
        assert set(row["measured"]) >= {"full", "slim", "transformers sdpa, dynamic cache"}
        assert row["predicted"]["cache_bytes_slim"] * 2 == row["predicted"]["cache_bytes_full"]
        assert row["predicted"]["decode_ratio"] == predict_decode(full, thin, row["context"])
        speeds = [t["decode_tokens_per_second"] for t in row["measured"].values()]
        assert all(speed > 0 for speed in speeds)
    assert found["saved"]["key_cache"] == found["saved"]["kv_cache"] == 0.5
    json.dumps(found)


def test_half_of_the_keys_can_never_double(tiny_gains):
    """Keys are half of the cache, so a quarter goes: 4/3 is the most, at any context."""
    model = load_hf("tiny")
    full = slim(model, SlicePlan.identity(model))
    thin = slim(model, SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.5)))
    found = verdict_on_doubling(sizes(full), sizes(thin), 1)
    assert found["limit"] == pytest.approx(4 / 3)
    assert found["from_context"] is None
    assert "can't double" in found["verdict"]
    assert predict_decode(full, thin, 10**9) == pytest.approx(4 / 3, rel=1e-3)


def test_the_plan_that_would_double(tiny_gains, tiny_calibration):
    """The verdict on half of the keys names it, and the prediction for it agrees."""
    model = load_hf("tiny")
    full = slim(model, SlicePlan.identity(model))
    half = slim(model, SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.5)))
    found = verdict_on_doubling(sizes(full), sizes(half), 1)
    context = found["with_a_quarter_left_from_context"]
    assert f"with a quarter of both left, {context} tokens" in found["verdict"]
    quarter = slim(
        model, SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.75), values=0.25), tiny_calibration
    )
    assert predict_decode(full, quarter, context) >= 2
    assert predict_decode(full, quarter, context // 2) < 2


def test_where_it_doubles_is_where_the_prediction_does(tiny_gains, tiny_calibration):
    model = load_hf("tiny")
    full = slim(model, SlicePlan.identity(model))
    thin = slim(
        model, SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.75), values=0.25), tiny_calibration
    )
    context = verdict_on_doubling(sizes(full), sizes(thin), 1)["from_context"]
    assert predict_decode(full, thin, context) >= 2
    assert context == 0 or predict_decode(full, thin, context - 1) < 2


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_stop_growing(originals, name):
    """Counted against the caches themselves and against the masks that the models use."""
    hf = originals[name]
    full = slim(hf, SlicePlan.identity(hf))
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    for model in (full, thin):
        found = sizes(model)
        attention = [m for m in model.modules() if isinstance(m, SlimAttention)]
        for context in (1, 5, 6, 7, 20):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(torch.ones(1, context - 1 or 1, dtype=torch.long), past_key_values=cache)
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            new = sum(4 * m.n_kv_heads * (m.head_dim + m.value_dim) for m in attention)
            wanted = held + new if context > 1 else held
            assert found.cache_bytes(context) == wanted  # with the token that is decoded
            seen = sum(
                min(p + 1, m.sliding_window or context) * 2 * m.n_heads * (m.head_dim + m.value_dim)
                for m in attention
                for p in range(context)
            )
            exact = found.prefill_flops(context) - found.flops
            assert exact * context == pytest.approx(seen, rel=1.2 / context)
    ratio = predict_decode(full, thin, 10_000)
    assert ratio == sum_read(full, 10_000) / sum_read(thin, 10_000)


def sum_read(model, context):
    attention = [m for m in model.modules() if isinstance(m, SlimAttention)]
    return sizes(model).weight_bytes + sum(
        4 * m.n_kv_heads * (m.head_dim + m.value_dim) * min(context, m.sliding_window or context)
        for m in attention
    )


@pytest.mark.parametrize(
    "windows", [(), ((6, 8, 8, 1),), ((6, 16, 16, 1),), ((4, 3, 5, 1), (9, 5, 6, 1))]
)
@pytest.mark.parametrize("weights", [(10, 8), (400, 390), (1000, 400)])
@pytest.mark.parametrize("share", [2, 4])
def test_doubling_with_windows_by_trying_every_context(windows, weights, share):
    before = Sizes(1, weights[0], 16, 16, 1, 1, windows)
    rest = tuple((w, k // share, v // share, f) for w, k, v, f in windows)
    after = Sizes(1, weights[1], 16 // share, 16 // share, 1, 1, rest)
    found = verdict_on_doubling(before, after, 1)["from_context"]
    far = 3000

    def doubles(c):
        return before.weight_bytes + before.cache_bytes(c) >= 2 * (
            after.weight_bytes + after.cache_bytes(c)
        )

    holds = [doubles(c) for c in range(far)]
    tried = None if not holds[-1] else max((c + 1 for c in range(far) if not holds[c]), default=0)
    assert found == tried


def test_a_model_that_is_not_slim():
    with pytest.raises(gl.errors.InputError, match="is no slim model"):
        sizes(load_hf("tiny"))
