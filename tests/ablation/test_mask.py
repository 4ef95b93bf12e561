"""KeyMask: scopes, units, rounding, files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gainlens as gl
from gainlens.ablation.key_mask import SCOPES, keep_by_order
from gainlens.model.sites import pair_partners

pytestmark = pytest.mark.one_env


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9)),
    fraction=st.floats(0, 1),
    scope=st.sampled_from(SCOPES),
    unit=st.sampled_from(["dim", "pair"]),
    pairing=st.sampled_from(["half", "adjacent", "none"]),
    seed=st.integers(0, 10),
)
def test_every_mask_cuts_the_share_asked_for(shape, fraction, scope, unit, pairing, seed):
    d_head = shape[-1]
    partner = pair_partners(d_head, d_head // 2 * 2, pairing)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if unit == "pair":
        values = values + values[..., partner]
    keep = keep_by_order(values, fraction, scope, unit, partner)
    assert keep.shape == shape
    if unit == "pair":
        assert torch.equal(keep, keep[..., partner])
    group = {"head": (2,), "layer": (1, 2), "model": (0, 1, 2), "universal": (2,)}[scope]
    cut = (~keep).sum(group)
    size = int(np.prod([shape[i] for i in group]))
    # The nearest that whole units allow: a unit is at most two dimensions.
    target = torch.full(cut.shape, fraction * size)
    if scope in ("layer", "model") and fraction < 1:  # every head keeps its best unit
        width = torch.where(partner == torch.arange(d_head), 1, 2) if unit == "pair" else 1
        best = values.argmax(-1)
        kept = (torch.as_tensor(width).expand(d_head)[best]).sum(group[:-1])
        target = torch.minimum(target, size - kept)
        assert keep.any(-1).all()
    assert float((cut - target).abs().max()) <= 1 + 1e-6
    if scope == "universal":
        assert (keep == keep[:1, :1]).all()
    elif scope == "head":
        for l, h in np.ndindex(*shape[:2]):
            kept, gone = values[l, h][keep[l, h]], values[l, h][~keep[l, h]]
            if len(kept) and len(gone) and (partner != torch.arange(d_head)).all():
                assert gone.max() <= kept.min()
    elif scope == "model" and unit == "dim" and 0 < keep.sum() < keep.numel():
        spared = torch.zeros_like(keep).scatter(-1, values.argmax(-1, keepdim=True), True)
        rest = keep & ~spared
        assert not rest.any() or values[~keep].max() <= values[rest].min()


def test_quietest_and_loudest_are_each_others_opposite(tiny_gains):
    for scope in SCOPES:
        quiet = gl.KeyMask.quietest(tiny_gains, 0.5, scope=scope)
        loud = gl.KeyMask.loudest(tiny_gains, 0.5, scope=scope)
        # Under a wide scope either order leaves every head the unit that would go last.
        spared = 2 * tiny_gains.shape[1] * (tiny_gains.shape[0] if scope == "model" else 1)
        allowed = 0 if scope in ("head", "universal") else spared
        assert int((quiet.keep == loud.keep).sum()) <= 2 * allowed, scope
        assert quiet.fraction_kept == loud.fraction_kept == 0.5


def test_random_depends_on_the_seed_only(tiny_gains):
    a, b, c = (gl.KeyMask.random(tiny_gains, 0.5, seed=s) for s in (1, 1, 2))
    assert a == b
    assert a != c
    assert a.whole_pairs(tiny_gains.model.partner)
    shared = gl.KeyMask.random(tiny_gains, 0.5, seed=1, scope="universal")
    assert (shared.keep == shared.keep[:1, :1]).all()


def test_key_only_scores_change_with_the_gauge_and_qk_does_not(tiny_gains):
    """Scaling a key pair by 50 and its query pair by 1/50 changes no logit."""
    sums = dict(tiny_gains.sums)
    for stage in ("projected", "rotated"):
        for name, factor in (("k_sum", 50.0), ("k_sq", 2500.0), ("q_sq", 1 / 2500.0)):
            scaled = sums[f"{name}.{stage}"].clone()
            scaled[1, 0, [3, 19]] *= factor
            sums[f"{name}.{stage}"] = scaled
    rescaled = gl.KeyGains(
        tiny_gains.model, sums, tiny_gains.n_tokens, 6, (), tiny_gains.frequencies
    )
    for unit in ("dim", "pair"):
        assert torch.allclose(
            rescaled.score("qk", unit=unit), tiny_gains.score("qk", unit=unit), rtol=1e-5
        )
        assert rescaled.score("rms", unit=unit)[1, 0, 3] > 40 * tiny_gains.score("rms")[1, 0, 3]


def test_masks_from_arrays(unchecked):
    assert gl.KeyMask(np.ones((1, 2, 4))).fraction_kept == 1
    assert gl.KeyMask([[[1, 0]]]).fraction_kept == 0.5
    for bad in (np.ones((2, 4)), np.full((1, 1, 2), 0.5), np.ones((0, 1, 2)), "x"):
        with pytest.raises(gl.errors.InputError, match="keep"):
            gl.KeyMask(bad)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_bad_fractions(unchecked, tiny_gains, fraction):
    with pytest.raises(gl.errors.InputError, match=r"outside 0\.\.1"):
        gl.KeyMask.quietest(tiny_gains, fraction)


def test_bad_choices(unchecked, tiny_gains):
    for bad in ({"scope": "x"}, {"unit": "x"}, {"score": "x"}, {"stage": "x"}):
        with pytest.raises(gl.errors.InputError, match="'x'"):
            gl.KeyMask.quietest(tiny_gains, 0.5, **bad)


def test_save_and_load(tiny_gains, tmp_path):
    mask = gl.KeyMask.quietest(tiny_gains, 0.25)
    mask.save(tmp_path / "m")
    again = gl.KeyMask.load(tmp_path / "m")
    assert again == mask
    assert again.facts == mask.facts
    (tmp_path / "m").write_bytes(b"no")
    with pytest.raises(gl.errors.FileFormatError):
        gl.KeyMask.load(tmp_path / "m")


def test_partial_rotary_units():
    """Six of twelve dimensions rotate: three pairs and six single dimensions."""
    partner = pair_partners(12, 6, "half")
    values = torch.tensor([9, 9, 1, 9, 9, 1, 2, 9, 9, 9, 9, 9.0])[None, None]
    keep = keep_by_order(values, 0.25, "head", "pair", partner)
    assert (~keep[0, 0]).nonzero().flatten().tolist() == [2, 5, 6]


def one_head(gains):
    """Gains of the first key head alone."""
    card = replace(gains.model, n_layers=1, n_kv_heads=1, n_heads=1)
    sums = {name: value[:1, :1].clone() for name, value in gains.sums.items()}
    return replace(gains, model=card, sums=sums, frequencies=gains.frequencies[:1])


def test_one_head_in_all_has_no_matched_control(tiny_gains):
    """It would be given its own cut: the quietest, under the name of a control."""
    with pytest.raises(gl.errors.InputError, match="one key head"):
        gl.KeyMask.matched(one_head(tiny_gains), 0.5)


@pytest.mark.parametrize("cut", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_the_share_kept_is_exact(cut):
    """float32 would make 0.30000001 of 0.3, which no verdict(0.3, …) then finds."""
    keep = torch.arange(10) >= round(10 * cut)
    assert 1 - gl.KeyMask(keep.expand(3, 7, 10)).fraction_kept == pytest.approx(cut, abs=1e-12)


def test_where_it_comes_from_is_kept_but_not_shown(tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    assert mask.facts["texts"] == list(tiny_gains.texts)
    assert tiny_gains.texts[0] not in repr(mask)
    assert "texts" not in gl.KeyMask.random(tiny_gains, 0.5).facts  # no text chose it
