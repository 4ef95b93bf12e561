"""Ablation against hand-written hooks, and its promises."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, NO_NORM, bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import hook_point


def run(model, tokens, hooks):
    with torch.inference_mode():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def half_mask(sites, whole=True, seed=0):
    keep = torch.rand(sites.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    return gl.KeyMask(keep & keep[..., sites.partner] if whole else keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_zeroing_is_what_a_plain_hook_does(name):
    model, tokens = bridge(name), family_tokens()
    sites = key_sites(model)
    mask = half_mask(sites)
    stage = "rot_k" if sites.rotated_fires else "k"
    plain = [
        (f"blocks.{l}.attn.hook_{stage}", lambda t, hook, l=l: t * mask.keep[l])
        for l in range(sites.n_layers)
    ]
    expected = run(model, tokens, plain)
    before = run(model, tokens, [])
    hooks = gl.ablation_hooks(model, mask)
    assert torch.equal(run(model, tokens, hooks), expected)
    assert all(hooks.fires)
    with torch.inference_mode(), gl.ablate(model, mask):
        assert torch.equal(model(tokens), expected)
    assert torch.equal(run(model, tokens, []), before)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in NO_NORM if FAMILIES[n][4]])
def test_whole_pairs_commute_with_the_rotation(name):
    model, tokens = bridge(name), family_tokens()
    sites = key_sites(model)
    whole, split = half_mask(sites), half_mask(sites, whole=False)

    def gap(mask):
        outs = [
            run(model, tokens, gl.ablation_hooks(model, mask, stage=stage))
            for stage in ("projected", "rotated")
        ]
        return float((outs[0] - outs[1]).abs().max())

    assert gap(whole) < 1e-4
    assert gap(split) > 1e-3


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n][5]])
def test_cutting_before_a_norm_is_refused_and_would_differ(name):
    model, tokens = bridge(name), family_tokens()
    sites = key_sites(model)
    mask = half_mask(sites)
    with pytest.raises(gl.errors.UnsupportedModelError, match="rotated"):
        gl.ablation_hooks(model, mask, stage="projected")
    before_norm = [
        (f"blocks.{l}.attn.hook_k", lambda t, hook, l=l: t * mask.keep[l])
        for l in range(sites.n_layers)
    ]
    after = run(model, tokens, gl.ablation_hooks(model, mask))
    assert (run(model, tokens, before_norm) - after).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GPTJForCausalLM", "Phi3ForCausalLM"])
def test_split_pairs_are_cut_after_the_rotation_also_where_no_hook_fires(name):
    """Against attention by hand: keys turned, cut, and the scores put in by a plain hook."""
    from oracle_rotation import rotate

    model, tokens = bridge(name), family_tokens()
    sites = key_sites(model)
    mask = half_mask(sites, whole=False)
    if FAMILIES[name][1].get("num_key_value_heads"):
        assert sites.group_size == 2
    patterns = {}

    def pattern_of(layer):
        def keep_pattern(t, hook):
            patterns[layer] = t.clone()

        return keep_pattern

    seen = {}
    hooks = [*gl.ablation_hooks(model, mask)]
    hooks += [(f"blocks.{l}.attn.hook_pattern", pattern_of(l)) for l in range(sites.n_layers)]
    read = [("blocks.0.attn.hook_q", lambda t, hook: seen.update(q=t.clone()))]
    raw = [("blocks.0.attn.hook_k", lambda t, hook: seen.update(k=t.clone()))]
    run(model, tokens, read + raw)
    run(model, tokens, hooks)
    q, k = (rotate(seen[x], sites.frequencies[0], sites.pairing) for x in ("q", "k"))
    k = (k * mask.keep[0]).repeat_interleave(sites.group_size, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / sites.d_head**0.5
    causal = torch.tril(torch.ones(12, 12)).bool()
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    assert torch.allclose(patterns[0], expected, atol=1e-4)


def test_mean_mode(any_tiny, tiny_calibration):
    gains = gl.probe_gains(any_tiny, tiny_calibration, progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5)
    mean = gains.mean("rotated")
    plain = [
        (
            f"blocks.{l}.attn.hook_rot_k",
            lambda t, hook, l=l: torch.where(mask.keep[l], t, mean[l]),
        )
        for l in range(4)
    ]
    with gl.ablate(any_tiny, mask, mode="mean", gains=gains), torch.inference_mode():
        out = any_tiny(tiny_calibration)
    assert torch.allclose(out, run(any_tiny, tiny_calibration, plain), atol=1e-5)
    with pytest.raises(gl.errors.InputError, match="needs gains"):
        gl.ablation_hooks(any_tiny, mask, mode="mean")


def test_hooks_write_nothing_in_place(tiny, tiny_calibration):
    mask = half_mask(key_sites(tiny))
    name, fn = gl.ablation_hooks(tiny, mask)[0]
    keys = torch.randn(2, 5, 2, 32)
    before = keys.clone()
    out = fn(keys, None)
    assert torch.equal(keys, before)
    assert out.data_ptr() != keys.data_ptr()
    assert name == "blocks.0.attn.hook_rot_k"


def test_ablate_leaves_no_trace(any_tiny, tiny_calibration):
    mask = half_mask(key_sites(any_tiny))
    point = hook_point(any_tiny, "blocks.0.attn.hook_rot_k")
    calls = []
    any_tiny.add_hook("blocks.0.attn.hook_rot_k", lambda t, hook: calls.append(1))
    try:
        with pytest.raises(ZeroDivisionError), gl.ablate(any_tiny, mask):
            raise ZeroDivisionError
        with torch.inference_mode(), gl.ablate(any_tiny, mask):
            any_tiny.run_with_hooks(tiny_calibration, fwd_hooks=[])
            assert len(point.fwd_hooks) == 2
            cut = any_tiny(tiny_calibration)
        assert len(point.fwd_hooks) == 1
        assert len(calls) == 2
        assert (cut - run(any_tiny, tiny_calibration, [])).abs().max() > 1e-3
    finally:
        any_tiny.reset_hooks()


def test_nested_ablations_add_up(any_tiny, tiny_calibration):
    sites = key_sites(any_tiny)
    a, b = half_mask(sites, seed=1), half_mask(sites, seed=2)
    both = gl.KeyMask(a.keep & b.keep)
    with torch.inference_mode(), gl.ablate(any_tiny, a), gl.ablate(any_tiny, b):
        nested = any_tiny(tiny_calibration)
    expected = run(any_tiny, tiny_calibration, gl.ablation_hooks(any_tiny, both))
    assert torch.allclose(nested, expected, atol=1e-6)


def test_an_ablation_that_did_nothing_is_an_error(any_tiny, tiny_calibration):
    mask = half_mask(key_sites(any_tiny))
    with pytest.raises(gl.errors.SilentSiteError), gl.ablate(any_tiny, mask):
        pass
    with (
        pytest.raises(gl.errors.SilentSiteError, match=r"\[2, 3\]"),
        torch.inference_mode(),
        gl.ablate(any_tiny, mask),
    ):
        any_tiny.run_with_hooks(tiny_calibration, stop_at_layer=2)


def test_bad_input(unchecked, tiny, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    with pytest.raises(gl.errors.InputError, match=r"cut has shape \(1, 1, 2\)"):
        gl.ablation_hooks(tiny, gl.KeyMask(torch.ones(1, 1, 2)))
    with pytest.raises(gl.errors.InputError, match="'x'"):
        gl.ablation_hooks(tiny, mask, mode="x")
    with pytest.raises(gl.errors.InputError, match="'x'"):
        gl.ablation_hooks(tiny, mask, stage="x")
    with pytest.raises(gl.errors.InputError, match="KeyMask"):
        gl.ablation_hooks(tiny, mask.keep)


def test_an_infinite_key_is_zeroed_and_not_multiplied():
    """0 · inf would be NaN: the cut must replace, not scale."""
    model = hugging_face("LlamaForCausalLM")
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    sites = key_sites(model)
    _, fn = gl.ablation_hooks(model, gl.KeyMask(torch.zeros(sites.shape)))[0]
    assert torch.equal(fn(torch.full((1, 2, 2, 16), torch.inf), None), torch.zeros(1, 2, 2, 16))
