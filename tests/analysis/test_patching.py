"""Patching single units against TransformerLens' own, and its one-pass estimate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import transformer_lens.patching as theirs
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.model.hooks import attached, hook_point


def metric(logits):
    return logits[:, -1, 7].mean() - logits[:, -1, 11].mean()


def prompts(tokens, rows=2, length=12):
    clean = tokens[:rows, :length].clone()
    corrupted = clean.clone()
    corrupted[:, 4] = (corrupted[:, 4] + 9) % 60
    return clean, corrupted


def test_agrees_with_generic_activation_patch(any_tiny, tiny_calibration):
    clean, corrupted = prompts(tiny_calibration)
    got = gl.patch_keys(any_tiny, clean, corrupted, metric=metric, progress=False)
    _, cache = any_tiny.run_with_cache(clean)
    index = pd.DataFrame(
        [(layer, h, p) for layer in range(4) for h in range(2) for p in (0, 3, 15)],
        columns=["layer", "head", "pair"],
    )

    def setter(activation, row, clean_cache):
        source = clean_cache
        if not isinstance(source, torch.Tensor):  # 3.9 hands over the whole cache
            source = source[f"blocks.{row[0]}.attn.hook_rot_k"]
        activation = activation.clone()
        dims = [row[2], row[2] + 16]
        activation[:, :, row[1], dims] = source[:, :, row[1], dims]
        return activation

    wanted = theirs.generic_activation_patch(
        any_tiny, corrupted, cache, metric, setter, "rot_k", index_df=index
    )
    ours = np.array([got.effect[row.layer, row.head, row.pair] for row in index.itertuples()])
    assert np.abs(ours).max() > 1e-3
    assert np.allclose(ours + got.corrupted, wanted.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """One unit by hand, at the last stage the model shows; the prefix is reused where it can be."""
    model = bridge(name)
    clean, corrupted = prompts(family_tokens())
    got = gl.patch_keys(model, clean, corrupted, metric=metric, layers=[1], progress=False)
    sites = gl.model.key_sites(model)
    dims = sorted({2, int(sites.partner[2])})
    unit = got.dims.index(dims[0])
    keep = torch.ones(sites.shape, dtype=torch.bool)
    keep[1, 0, dims] = False
    cache = gl.ablation.KeyCache.run(model, clean)
    hooks = gl.ablation_hooks(model, gl.KeyMask(keep), "patch", cache=cache)
    with torch.inference_mode(), attached(model, hooks):
        wanted = float(metric(model(corrupted, return_type="logits")))
    assert got.effect[1, 0, unit] + got.corrupted == pytest.approx(wanted, abs=1e-4)
    assert np.isnan(got.effect[0]).all()


def test_layers_below_are_not_run_again(monkeypatch, tiny, tiny_calibration):
    from gainlens.model.fast_copy import FastCopy

    clean, corrupted = prompts(tiny_calibration)
    started = []
    real = FastCopy.hidden_from

    def noted(self, layer, *rest):
        started.append(layer)
        return real(self, layer, *rest)

    monkeypatch.setattr(FastCopy, "hidden_from", noted)
    evaluator_layers = []
    import gainlens.analysis.patching as patching

    class Spy(patching._Runner):
        def __init__(self, *args):
            super().__init__(*args)
            for number, layer in enumerate(self.fast_copy._layers):
                layer.self_attn.register_forward_hook(
                    lambda *_, number=number: evaluator_layers.append(number)
                )

    monkeypatch.setattr(patching, "_Runner", Spy)
    gl.patch_keys(tiny, clean, corrupted, metric=metric, layers=[3], progress=False)
    assert set(started) == {3}
    # Two whole runs of either prompt, then layer 3 alone.
    run = [evaluator_layers.count(i) for i in range(4)]
    assert run[0] == run[2] == 4
    assert run[3] == 4 + len(started)


def test_attribution_is_the_first_order_of_the_exact_effect(any_tiny, tiny_calibration):
    clean, corrupted = prompts(tiny_calibration)
    exact = gl.patch_keys(any_tiny, clean, corrupted, metric=metric, progress=False)
    estimate = gl.analysis.attribution_patching(any_tiny, clean, corrupted, metric=metric)
    assert exact.correlation(estimate) > 0.8
    assert estimate.corrupted == pytest.approx(exact.corrupted, abs=1e-4)
    # For a small step the two are the same: clean keys a thousandth of the way off.
    base = gl.ablation.KeyCache.run(any_tiny, corrupted)
    far = gl.ablation.KeyCache.run(any_tiny, clean)
    near = gl.ablation.KeyCache(
        [b + 0.01 * (f - b) for b, f in zip(base.keys, far.keys, strict=True)]
    )
    exact = gl.patch_keys(any_tiny, near, corrupted, metric=metric, progress=False)
    estimate = gl.analysis.attribution_patching(any_tiny, near, corrupted, metric=metric)
    assert exact.correlation(estimate) > 0.99


def test_patching_the_same_prompt_changes_nothing(tiny, tiny_calibration):
    clean, _ = prompts(tiny_calibration)
    got = gl.patch_keys(tiny, clean, clean, metric=metric, unit="dim", layers=[0], progress=False)
    assert got.effect.shape == (4, 2, 32)
    assert np.nanmax(np.abs(got.effect)) < 1e-5
    with pytest.raises(gl.errors.InputError, match="shares are undefined"):
        got.normalised


def test_bad_input(tiny, tiny_calibration):
    clean, corrupted = prompts(tiny_calibration)
    for bad in (lambda x: torch.tensor(float("nan")), lambda x: x, lambda x: None):
        with pytest.raises(gl.errors.InputError, match="metric"):
            gl.patch_keys(tiny, clean, corrupted, metric=bad, progress=False)
    for other in (clean[:, :10], gl.ablation.KeyCache.run(tiny, clean[:, :10])):
        with pytest.raises(gl.errors.InputError, match="positions match"):
            gl.patch_keys(tiny, other, corrupted, metric=metric, progress=False)
    with pytest.raises(gl.errors.InputError, match="unit='head'"):
        gl.patch_keys(tiny, clean, corrupted, metric=metric, unit="head")
    with pytest.raises(gl.errors.InputError, match="layers"):
        gl.patch_keys(tiny, clean, corrupted, metric=metric, layers=[4])
    with pytest.raises(gl.errors.InputError, match="differentiable"):
        gl.analysis.attribution_patching(tiny, clean, corrupted, metric=lambda x: 1.0)
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


@pytest.mark.parametrize("name", ["GPTJForCausalLM", "FalconForCausalLM", "LlamaForCausalLM"])
def test_blocks_below_are_skipped_where_no_fast_copy_can_be_made(name, monkeypatch):
    """GPT-J and Falcon keep attention to themselves; bfloat16 copies are not equal to the bit."""
    if name not in FAMILIES:
        pytest.skip("refused on this transformer-lens")
    model = bridge(name)
    clean, corrupted = prompts(family_tokens())
    gl.model.key_sites(model)  # measured once; not part of what is counted
    settings = {"metric": metric, "layers": [1], "progress": False}
    if name == "LlamaForCausalLM":
        usual = gl.patch_keys(model, clean, corrupted, **settings)
        settings["evaluator"] = Evaluator(model, fast=False)
    runs = [0, 0]

    def counter(layer):
        def count(keys, hook):
            runs[layer] += 1

        return count

    points = [hook_point(model, f"blocks.{layer}.attn.hook_k") for layer in (0, 1)]
    try:
        for layer, point in enumerate(points):
            point.add_hook(counter(layer))
        got = gl.patch_keys(model, clean, corrupted, **settings)
    finally:
        model.reset_hooks()
    assert runs[1] > runs[0]
    # Two runs of either prompt (cache, metric), then layer 1 and above alone.
    assert runs[0] == 3
    if name == "LlamaForCausalLM":
        assert np.allclose(got.effect, usual.effect, atol=1e-5, equal_nan=True)
    assert all("forward" not in block.__dict__ for block in model.blocks)
    after = gl.patch_keys(model, clean, corrupted, **settings)
    assert np.allclose(got.effect, after.effect, atol=1e-5, equal_nan=True)


def test_a_gradient_that_is_not_finite(tiny, tiny_calibration):
    clean, corrupted = prompts(tiny_calibration)

    def root(logits):
        return (logits[:, -1, 7].mean() * 0).sqrt()

    with pytest.raises(gl.errors.InputError, match="root.*no finite gradient"):
        gl.analysis.attribution_patching(tiny, clean, corrupted, metric=root)


def test_prompts_of_unequal_length_and_a_clean_run_without_its_metric(tiny, tiny_calibration):
    clean, corrupted = prompts(tiny_calibration)
    ragged = [clean[0], clean[1, :8]]
    for pair in ((ragged, corrupted), (clean, ragged)):
        for call in (gl.patch_keys, gl.analysis.attribution_patching):
            with pytest.raises(gl.errors.InputError, match="8 to 12 tokens"):
                call(tiny, *pair, metric=metric)
    got = gl.patch_keys(
        tiny,
        gl.ablation.KeyCache.run(tiny, clean),
        corrupted,
        metric=metric,
        layers=[3],
        progress=False,
    )
    with pytest.raises(gl.errors.InputError, match="KeyCache"):
        got.normalised
    # Lists of lists are documents too.
    same = gl.patch_keys(
        tiny, clean.tolist(), corrupted.tolist(), metric=metric, layers=[3], progress=False
    )
    assert np.array_equal(same.effect, got.effect, equal_nan=True)
    assert np.isfinite(same.normalised[3]).all()


def test_hooks_of_the_user_act_once(any_tiny, tiny_calibration):
    """Also one on what the patched layer reads, where the run from that layer on begins."""
    clean, corrupted = prompts(tiny_calibration)

    def louder(residual, hook):
        return residual * 1.5

    keep = torch.ones(gl.model.key_sites(any_tiny).shape, dtype=torch.bool)
    keep[2, 1, [3, 19]] = False
    with attached(any_tiny, [("blocks.2.hook_resid_pre", louder)]):
        got = gl.patch_keys(any_tiny, clean, corrupted, metric=metric, layers=[2], progress=False)
        cache = gl.ablation.KeyCache.run(any_tiny, clean)
        hooks = gl.ablation_hooks(any_tiny, gl.KeyMask(keep), "patch", cache=cache)
        with torch.inference_mode(), attached(any_tiny, hooks):
            wanted = float(metric(any_tiny(corrupted, return_type="logits")))
    assert got.effect[2, 1, 3] + got.corrupted == pytest.approx(wanted, abs=1e-4)
