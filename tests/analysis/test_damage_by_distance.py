"""Change of attention by distance is what plain softmax over a full cache gives, pair by pair."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers
from families import ALL_FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.analysis import attention_by_layer, change_by_distance
from gainlens.analysis.sweep.evaluator import Evaluator


def plain_attention(model, document, keep=None):
    """``[layer, head, query, key]`` in float64 from a cache of the intact model."""
    with torch.inference_mode():
        cache = model.run_with_cache(document[None], return_type=None)[1]
    patterns = []
    for layer in range(model.cfg.n_layers):
        q = cache[f"blocks.{layer}.attn.hook_rot_q"][0].double().numpy()
        k = cache[f"blocks.{layer}.attn.hook_rot_k"][0].double().numpy()
        if keep is not None:
            k = k * keep[layer].numpy()
        k = k.repeat(q.shape[1] // k.shape[1], 1)
        logits = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        patterns.append(weights / weights.sum(-1, keepdims=True))
    return np.array(patterns)


def by_hand(values, first, last):
    """Mean over the queries that see a key there of the sum over keys, ``[layer, head]``."""
    sums = []
    for i in range(first, values.shape[2]):
        sums.append(sum(values[..., i, j] for j in range(i + 1) if first <= i - j <= last))
    return np.mean(sums, 0)


@pytest.mark.parametrize("fast", [True, False])
def test_each_bucket_is_that_of_plain_softmax(
    any_tiny, tiny_gains, tiny_validation, fast, monkeypatch
):
    # Seven queries at a time, so that chunks are joined.
    monkeypatch.setattr(attention_by_layer, "CHUNK", 7 * 4 * 40)
    cuts = {
        "quiet": gl.KeyMask.quietest(tiny_gains, 0.5),
        "loud": gl.KeyMask.loudest(tiny_gains, 0.25),
    }
    documents = [tiny_validation[0][:40], tiny_validation[1][:3]]
    found = change_by_distance(
        any_tiny,
        documents,
        cuts,
        edges=(0, 1, 5, 600),
        evaluator=Evaluator(any_tiny, fast=fast),
        progress=False,
    )
    assert found.buckets == ((0, 0), (1, 4), (5, 39))
    assert found.n_queries == (43, 41, 35)
    assert found.lengths == (40, 3)
    intact = [plain_attention(any_tiny, d) for d in documents]
    for c, mask in enumerate(cuts.values()):
        cut = [plain_attention(any_tiny, d, mask.keep) for d in documents]
        for b, (first, last) in enumerate(found.buckets):
            reach = [n for n, d in enumerate(documents) if len(d) > first]

            def mean(values, first=first, last=last, reach=reach):
                return np.mean([by_hand(values[n], first, last) for n in reach], 0)

            changed = [np.abs(x - y) for x, y in zip(cut, intact, strict=True)]
            np.testing.assert_allclose(found.attention[..., b], mean(intact), atol=2e-5)
            np.testing.assert_allclose(found.after[c, ..., b], mean(cut), atol=2e-5)
            np.testing.assert_allclose(found.change[c, ..., b], mean(changed), atol=5e-5)
            for n in range(2):
                if n in reach:
                    one = by_hand(changed[n], first, last).mean()
                    assert found.by_document[c, b, n] == pytest.approx(one, abs=5e-5)
                else:
                    assert np.isnan(found.by_document[c, b, n])
    row = found.table()[0]
    assert (row["cut"], row["n_documents"]) == ("quiet", 2)
    assert row["change"] == pytest.approx(found.change[0, ..., 0].mean())
    assert found.change.max() > 0.05


def test_a_cut_that_takes_nothing_changes_nothing(tiny, tiny_gains, tiny_validation):
    whole = gl.KeyMask(torch.ones(tiny_gains.shape, dtype=torch.bool))
    found = change_by_distance(tiny, tiny_validation[:2], whole, progress=False)
    assert found.buckets == ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))
    assert np.abs(found.change).max() == 0
    assert (found.after == found.attention).all()
    assert found.cut_pairs.sum() == 0
    # What a query gives to all keys is 1, and the last query sees all distances.
    assert found.attention[..., 0].max() <= 1


def pair_mask(model, cut_pairs):
    """Of half-split pairs."""
    cfg = model.cfg
    keep = torch.ones(cfg.n_layers, cfg.n_key_value_heads, cfg.d_head, dtype=torch.bool)
    for pair in cut_pairs:
        keep[..., [pair, pair + cfg.d_head // 2]] = False
    return gl.KeyMask(keep)


def test_fast_pairs_change_short_distances_and_slow_ones_long_distances():
    """Tokens that are all alike, so that a pair's share of a logit hangs on distance times
    frequency alone: the slow pairs, at most 0.01 radians per token, are nearly the same for all
    keys of a short text and the softmax ignores them; the fast ones turn within a few tokens."""
    model = bridge("LlamaForCausalLM")
    pairs = model.cfg.d_head // 2
    cuts = {"fast": pair_mask(model, range(2)), "slow": pair_mask(model, range(4, pairs))}
    changes = []
    for length in (6, 60):
        tokens = torch.full((1, length), 7)
        found = change_by_distance(model, tokens, cuts, edges=(0,), progress=False)
        changes.append(found.change[..., 0].mean((1, 2)))
    (fast_short, slow_short), (fast_long, slow_long) = changes
    assert fast_short > 10 * slow_short
    assert slow_long > 3 * slow_short
    assert fast_short / fast_long > 3 * slow_short / slow_long
    # Base 10,000 over eight pairs.
    theta = 10_000.0 ** (-np.arange(pairs) / pairs)
    np.testing.assert_allclose(found.wavelengths, 2 * np.pi / theta, rtol=1e-3)
    heads = model.cfg.n_layers * model.cfg.n_key_value_heads
    assert found.pairs.tolist() == [heads] * pairs
    assert found.cut_pairs.tolist() == [
        [heads] * 2 + [0] * (pairs - 2),
        [0] * 4 + [heads] * (pairs - 4),
    ]


def test_pairs_that_do_not_turn_have_no_wavelength():
    """Of Pythia's twelve dimensions six turn, three pairs; the others are alone."""
    model = bridge("GPTNeoXForCausalLM")
    keep = torch.ones(2, 4, 12, dtype=torch.bool)
    keep[0, 0, 0] = False  # half of the fastest pair
    keep[1, 2, 8:] = False
    found = change_by_distance(model, family_tokens(), gl.KeyMask(keep), progress=False)
    rows = found.wavelength_table()
    assert [r["pairs"] for r in rows] == [8, 8, 8, 48]
    assert [r["cut_pairs"] for r in rows] == [1, 0, 0, 4]
    assert rows[0]["wavelength"] == pytest.approx(2 * np.pi, rel=1e-3)
    assert rows[-1]["wavelength"] == np.inf


def small(name, **settings):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    kind, arguments, *_ = ALL_FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**arguments, **settings})
    config.architectures = [name]
    hf = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.2 / parameter.std())
    return build_bridge_from_module(hf, name, hf_config=config)


@pytest.mark.parametrize("fast", [True, False])
def test_a_window_is_refused_where_the_text_is_longer(fast):
    model = small("MistralForCausalLM", sliding_window=6)
    mask = pair_mask(model, [3])
    evaluator = Evaluator(model, fast=fast)
    assert (evaluator.fast_copy is not None) == fast
    for _ in range(2):  # a long text does not spoil a short one after it
        with pytest.raises(gl.errors.UnsupportedModelError, match="more than causal"):
            change_by_distance(model, family_tokens(), mask, evaluator=evaluator, progress=False)
        short = family_tokens(length=5)
        found = change_by_distance(model, short, mask, evaluator=evaluator, progress=False)
        intact = [plain_attention(model, row) for row in short]
        wanted = np.mean([by_hand(one, 1, 1) for one in intact], 0)
        np.testing.assert_allclose(found.attention[..., 1], wanted, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_a_soft_cap_is_refused(fast):
    model = small("Gemma2ForCausalLM", attn_logit_softcapping=1.0)
    mask = pair_mask(model, [3])
    evaluator = Evaluator(model, fast=fast)
    with pytest.raises(gl.errors.UnsupportedModelError, match="more than causal"):
        change_by_distance(model, family_tokens(), mask, evaluator=evaluator, progress=False)


def test_json_and_figure(tiny, tiny_gains, tiny_validation):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    found = change_by_distance(tiny, tiny_validation[:1], mask, progress=False)
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["rows"][1]["change"] == found.table()[1]["change"]
    assert sum(r["cut_pairs"] for r in read["wavelengths"]) == 4 * 2 * 8
    ax = found.plot()
    assert ax.get_ylabel().startswith("absolute change of attention")
    assert [t.get_text() for t in ax.get_xticklabels()][-2:] == ["32–63", "longer"]
    plt.close("all")
    assert "distance between query and key" in found._repr_html_()


def test_bad_input(unchecked, tiny, tiny_gains, tiny_validation, tiny_calibration):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    with pytest.raises(gl.errors.InputError, match=r"edges=\(1, 2\)"):
        change_by_distance(tiny, tiny_validation, mask, edges=(1, 2), progress=False)
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        change_by_distance(tiny, tiny_calibration, mask, progress=False)
    projected = mask.in_mode("zero", stage="projected")
    with pytest.raises(gl.errors.InputError, match="stage='projected'"):
        change_by_distance(tiny, tiny_validation, projected, progress=False)
