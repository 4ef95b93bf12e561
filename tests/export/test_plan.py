"""Slice plans: what they keep, refuse, and how they are stored."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slim_families import random_keep, shape_of

import gainlens as gl
from gainlens.ablation import KeyMask
from gainlens.errors import FileFormatError, InputError
from gainlens.export import SlicePlan, canonical_plan, slim
from gainlens.export.layout import head_layout
from gainlens.files import sealed


def plan_with(keep, **kwargs):
    return SlicePlan(torch.as_tensor(keep, dtype=torch.bool), **kwargs)


def test_from_mask_carries_the_facts(tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer")
    plan = SlicePlan.from_mask(mask)
    assert torch.equal(plan.keep, mask.keep)
    assert {k: plan.facts[k] for k in ("score", "scope", "fraction")} == {
        "score": "qk",
        "scope": "layer",
        "fraction": 0.5,
    }
    assert plan.mask == mask


def test_from_gains_belongs_to_the_model(tiny, tiny_gains):
    plan = SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 0.75, scope="model"))
    assert plan.fingerprint == tiny_gains.model.fingerprint == SlicePlan.identity(tiny).fingerprint
    assert bool(plan.keep.any(-1).all())
    assert abs(plan.fraction_kept - 0.25) < 0.05
    plan.check_pairs(32)
    slim(tiny, plan)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, True, "half"])
def test_shares_that_mean_nothing(unchecked, tiny_gains, fraction):
    with pytest.raises(InputError, match="fraction="):
        KeyMask.quietest(tiny_gains, fraction)


def test_a_plan_of_nothing(tiny_gains):
    with pytest.raises(InputError, match="no dimension"):
        SlicePlan.from_cut(KeyMask.quietest(tiny_gains, 1.0))


def test_a_head_with_nothing():
    keep = torch.ones(3, 2, 8, dtype=torch.bool)
    keep[2, 1] = False
    with pytest.raises(InputError, match="key head 1 of layer 2 no dimension"):
        SlicePlan(keep)


@given(st.integers(0, 10_000), st.sampled_from([0, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_layout_holds_every_kept_dimension_once(seed, rotary_dim):
    keep = random_keep((1, 3, 8), rotary_dim, seed=seed)[0].numpy()
    layout = head_layout(keep, rotary_dim)
    for row, kept in zip(layout.order, keep, strict=True):
        assert sorted(row[row >= 0]) == [int(i) for i in kept.nonzero()[0]]
    if rotary_dim:
        assert layout.width % 2 == 0
        half, n_pairs = layout.width // 2, rotary_dim // 2
        assert layout.width == max(2 * ((k.sum() + 1) // 2) for k in keep)
        for row, angles in zip(layout.order, layout.frequency, strict=True):
            for slot in range(half):
                a, b = row[slot], row[slot + half]
                if 0 <= a < rotary_dim:  # a pair turns together, by its own frequency
                    assert (b, angles[slot]) == (a + n_pairs, a)
                elif a >= 0 and rotary_dim < 8:
                    assert angles[slot] == n_pairs
                    assert b == -1 or b >= rotary_dim
    else:
        assert layout.width == keep.sum(1).max()


def test_json_round_trip(tmp_path):
    keep = random_keep((2, 2, 8), 8)
    plan = SlicePlan(keep, (4, 8), fingerprint="ab" * 32, facts={"score": "qk"})
    plan.save(tmp_path / "plan.json")
    again = SlicePlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.facts == plan.facts
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "again.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "gainlens-0"},
        {"kind": "mask"},
        {"keep": [[[0, 99]]]},
        {"keep": [[[0, -1]]]},
        {"keep": []},
        {"keep": None},
        {"shape": [1, 1]},
    ],
)
def test_files_that_are_no_plan(tmp_path, change):
    good = plan_with([[[1, 0, 1, 0]]]).to_json()
    bad = sealed("slice_plan", {k: v for k, v in {**good, **change}.items() if k != "checksum"})
    (tmp_path / "plan.json").write_text(json.dumps(bad))
    with pytest.raises(FileFormatError, match=r"plan\.json"):
        SlicePlan.load(tmp_path / "plan.json")


def test_truncated_file(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "gainl')
    with pytest.raises(FileFormatError):
        SlicePlan.load(tmp_path / "plan.json")
    with pytest.raises(FileFormatError):
        SlicePlan.load(tmp_path / "missing.json")


def test_value_widths():
    plan = plan_with([[[1, 1, 1, 1]]] * 2)
    assert plan.with_values(0.5).value_widths == (2, 2)
    assert plan.with_values(3).value_widths == (3, 3)
    assert plan.with_values([1, 4]).value_widths == (1, 4)
    assert plan.with_values(3).with_values(None).value_widths is None
    for bad in (0, 5, [1], 1.5, True, "2"):
        with pytest.raises((InputError, TypeError)):
            plan.with_values(bad)


def test_nearest_shared_keeps_what_most_heads_keep():
    keep = torch.zeros(2, 2, 8, dtype=torch.bool)
    keep[..., [0, 4]] = True
    keep[0, 0, [1, 5]] = keep[0, 1, [1, 5]] = keep[1, 0, [2, 6]] = keep[1, 1, [1, 5]] = True
    nearest = SlicePlan(keep).nearest_shared(8)
    assert nearest.shared
    assert nearest.keep[0, 0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert nearest.nearest_shared(8) == nearest


def test_canonical_plan_is_for_models_that_do_not_rotate(originals):
    with pytest.raises(gl.errors.UnsupportedModelError, match="rotates its keys"):
        canonical_plan(originals["llama"])
    plan = canonical_plan(originals["gpt2"], 0.5)
    assert plan.keep.sum(-1).unique().tolist() == [4]
    assert plan.keep[..., :4].all()  # strongest first
    for scope in ("layer", "model"):
        assert canonical_plan(originals["gpt2"], 0.5, scope).shape == shape_of(originals["gpt2"])


def test_canonical_cut_is_the_best_low_rank_product(originals):
    """Against numpy's own decomposition of each head's product, biases included."""
    import numpy as np

    hf = originals["gpt2"]
    plan = canonical_plan(hf, 0.625)
    thin = slim(hf, plan)
    for layer, (old, new) in enumerate(zip(hf.transformer.h, thin.transformer.h, strict=True)):
        q, k, _ = old.attn.c_attn.weight.detach().double().T.reshape(3, 4, 8, 32).numpy()
        bq, bk, _ = old.attn.c_attn.bias.detach().double().reshape(3, 4, 8).numpy()
        width = new.attn.head_dim
        assert width == int(plan.keep[layer].sum(-1).max())
        tq = new.attn.q_proj.weight.detach().double().reshape(4, width, 32).numpy()
        tk = new.attn.k_proj.weight.detach().double().reshape(4, width, 32).numpy()
        tbq = new.attn.q_proj.bias.detach().double().reshape(4, width).numpy()
        tbk = new.attn.k_proj.bias.detach().double().reshape(4, width).numpy()
        for head in range(4):
            full = np.c_[q[head], bq[head]].T @ np.c_[k[head], bk[head]]
            left, sizes, right = np.linalg.svd(full)
            best = left[:, :3] * sizes[:3] @ right[:3]
            got = np.c_[tq[head], tbq[head]].T @ np.c_[tk[head], tbk[head]]
            np.testing.assert_allclose(got, best, atol=1e-5)


def test_canonical_identity_changes_no_logit(originals):
    hf = originals["gpt2"]
    thin = slim(hf, canonical_plan(hf, 0.0))
    tokens = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        assert (thin(tokens).logits - hf(tokens).logits).abs().max() <= 1e-5
