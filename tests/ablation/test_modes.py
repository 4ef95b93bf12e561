"""Resample and patch against tensors put together by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.model.hooks import attached

FIRING = ["LlamaForCausalLM", "Qwen3ForCausalLM", "GlmForCausalLM"]


def logits(model, tokens, hooks=()):
    with torch.inference_mode(), attached(model, list(hooks)):
        return model(tokens, return_type="logits")


def random_mask(model, seed=0):
    shape = gl.model.key_sites(model).shape
    return gl.KeyMask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5)


def by_hand(model, tokens, mask, donors):
    """Keys of ``donors`` (tokens, one row per prompt) in the cut dimensions."""
    seen = {}
    names = [f"blocks.{i}.attn.hook_rot_k" for i in range(model.cfg.n_layers)]
    logits(model, donors, [(n, lambda k, hook, n=n: seen.update({n: k.clone()})) for n in names])

    def put(k, hook, n, layer):
        out = k.clone()
        cut = ~mask.keep[layer]
        out[..., cut] = seen[n][..., cut]
        return out

    hooks = [(n, lambda k, hook, n=n, i=i: put(k, hook, n, i)) for i, n in enumerate(names)]
    return logits(model, tokens, hooks)


@pytest.mark.parametrize("name", FIRING)
def test_patch_puts_in_the_other_run(name):
    model, tokens, other = bridge(name), family_tokens(), family_tokens(seed=5)
    mask = random_mask(model)
    cache = gl.ablation.KeyCache.run(model, other)
    got = logits(model, tokens, gl.ablation_hooks(model, mask, "patch", cache=cache))
    wanted = by_hand(model, tokens, mask, other)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (got - logits(model, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("name", FIRING)
@pytest.mark.parametrize("seed", [0, 1])
def test_resample_puts_in_another_document(name, seed):
    model, tokens = bridge(name), family_tokens()
    mask, cache = random_mask(model), gl.ablation.KeyCache.run(model, tokens)
    got = logits(model, tokens, gl.ablation_hooks(model, mask, "resample", cache=cache, seed=seed))
    wanted = by_hand(model, tokens, mask, tokens.roll(-(1 + seed), 0))
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_cache_changes_nothing(name):
    """In every family, those that fire no hook after the rotation included."""
    model, tokens = bridge(name), family_tokens()
    cache = gl.ablation.KeyCache.run(model, tokens)
    hooks = gl.ablation_hooks(model, random_mask(model), "patch", cache=cache)
    assert torch.allclose(logits(model, tokens, hooks), logits(model, tokens), atol=2e-4)
    hooks.check_fired()


def test_no_document_gives_to_itself():
    from gainlens.ablation.modes import Context, get_mode

    model = bridge("LlamaForCausalLM")
    sites = gl.model.key_sites(model)
    for n in (2, 3, 5):
        keys = torch.arange(n).float()[:, None, None, None].expand(n, 4, 2, 16)
        cache = gl.ablation.KeyCache([keys] * 2)
        for seed in range(7):
            mode = get_mode("resample").replacement(Context(sites, "rotated", None, cache, seed))
            given = mode(keys, 0)
            assert (given != keys).all()
            assert sorted(given[:, 0, 0, 0].tolist()) == list(range(n))


def test_surgery_takes_resample_and_both_ways_agree(tiny, tiny_validation, tiny_gains):
    curves = [
        gl.surgery(
            tiny,
            tiny_validation,
            tiny_gains,
            fractions=(0.5,),
            orders=("quietest",),
            mode="resample",
            fast=fast,
            progress=False,
        )
        for fast in (True, False)
    ]
    assert curves[0].losses == pytest.approx(curves[1].losses, abs=1e-5)
    zero = gl.surgery(
        tiny, tiny_validation, tiny_gains, fractions=(0.5,), orders=("quietest",), progress=False
    )
    assert abs(curves[0].losses - zero.losses).max() > 1e-3
    with pytest.raises(gl.errors.InputError, match="patch_keys"):
        gl.surgery(tiny, tiny_validation, tiny_gains, mode="patch", progress=False)


def test_bad_caches(tiny, tiny_calibration):
    mask = random_mask(tiny)
    for mode in ("resample", "patch"):
        with pytest.raises(gl.errors.InputError, match="cache"):
            gl.ablation_hooks(tiny, mask, mode)
    longer = gl.ablation.KeyCache.run(tiny, tiny_calibration[:2, :20])
    hooks = gl.ablation_hooks(tiny, mask, "patch", cache=longer)
    with pytest.raises(gl.errors.InputError, match="same length"):
        logits(tiny, tiny_calibration[:2, :16], hooks)
    hooks = gl.ablation_hooks(tiny, mask, "resample", cache=longer)
    with pytest.raises(gl.errors.InputError, match="positions"):
        logits(tiny, tiny_calibration[:2, :24], hooks)
    one = gl.ablation.KeyCache.run(tiny, tiny_calibration[:1, :16])
    with pytest.raises(gl.errors.InputError, match="two documents"):
        gl.ablation_hooks(tiny, mask, "resample", cache=one)
    projected = gl.ablation.KeyCache.run(tiny, tiny_calibration[:2, :16], stage="projected")
    with pytest.raises(gl.errors.InputError, match="stage"):
        gl.ablation_hooks(tiny, mask, "patch", cache=projected)


@pytest.mark.parametrize("fast", [True, False])
def test_a_document_alone_in_its_batch_is_given_keys_too(
    fast, tiny, tiny_calibration, tiny_validation
):
    """The last of five, or every one that fills a batch: donors come from the other batches."""
    tokens = [*tiny_validation[:2, :30], tiny_validation[2, :20], tiny_validation[3, :40]]
    tokens += [tiny_validation[4, :40]]
    gains = gl.probe_gains(tiny, tiny_calibration, progress=False)
    curve = gl.surgery(
        tiny, tokens, gains, (0.5,), orders=("quietest",), mode="resample", fast=fast,
        tokens_per_batch=64, progress=False,
    )  # fmt: skip
    mask = gl.KeyMask.quietest(gains, 0.5)
    # Document 2 is alone: its first donor is the next that is long enough, document 3.
    alone, donor = tokens[2][None], tokens[3][None, :20]
    found = by_hand(tiny, alone, mask, donor)[0, :-1].log_softmax(-1)
    wanted = -found.gather(1, alone[0, 1:, None]).mean()
    assert curve.losses[0, 2] == pytest.approx(float(wanted), abs=1e-5)
    assert np.isfinite(curve.losses).all()


def test_a_document_that_nobody_can_give_to(tiny, tiny_validation, tiny_gains):
    tokens = [tiny_validation[0, :20], tiny_validation[1, :40]]
    with pytest.raises(gl.errors.InputError, match="no other document"):
        gl.surgery(tiny, tokens, tiny_gains, (0.5,), mode="resample", progress=False)
    # Before anything is run, not in the middle of a sweep.
    with pytest.raises(gl.errors.InputError, match="'x'"):
        gl.surgery(tiny, tokens, tiny_gains, (0.5,), mode="x", progress=False)


@pytest.mark.parametrize("mode", ["patch", "resample"])
def test_a_cache_of_another_model(mode, tiny, tiny_calibration):
    cache = gl.ablation.KeyCache.run(bridge("LlamaForCausalLM"), family_tokens())
    with pytest.raises(gl.errors.InputError, match="another model"):
        gl.ablation_hooks(tiny, random_mask(tiny), mode, cache=cache)
    own = gl.ablation.KeyCache.run(tiny, tiny_calibration[:2, :12])
    with pytest.raises(gl.errors.InputError, match="another model"):
        gl.ablation_hooks(tiny, random_mask(tiny), mode, cache=gl.ablation.KeyCache(own.keys[:2]))
    with pytest.raises(gl.errors.InputError, match="12 to 16 tokens"):
        gl.ablation.KeyCache.run(tiny, [tiny_calibration[0, :12], tiny_calibration[1, :16]])
