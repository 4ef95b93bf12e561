"""The fast way (fused attention around the same weights) gives what the hooks give."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.ablation.hooks import ablation_hooks
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.model.hooks import attached

# These keep attention to themselves, and transformers' own StableLM can't run a rotary width of 3:
# the hooks must do the work there, with the same numbers.
NO_FAST_COPY = {
    "BloomForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "MptForCausalLM",
    "StableLmForCausalLM",
}


def plain(model, tokens, hooks):
    with torch.inference_mode(), attached(model, hooks):
        logits = model(tokens, return_type="logits").double()
    picked = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return -picked[..., 0]


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fast_is_slow(name, mode):
    model = bridge(name)
    tokens = family_tokens()
    gains = gl.probe_gains(model, family_tokens(seed=2), progress=False)
    mask = gl.KeyMask(torch.rand(gains.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    evaluator = Evaluator(model)
    assert (evaluator.fast_copy is None) == (name in NO_FAST_COPY)
    hooks = ablation_hooks(model, mask, mode, gains=gains)
    wanted, intact = plain(model, tokens, hooks), plain(model, tokens, [])
    assert (wanted - intact).abs().max() > 1e-3
    cut = mask.in_mode(mode, gains=gains)
    assert torch.allclose(evaluator.tokens(tokens, cut).double(), wanted, atol=1e-4)
    assert torch.allclose(evaluator.tokens(tokens).double(), intact, atol=1e-4)


def test_both_model_classes(any_tiny, tiny_validation):
    tokens = tiny_validation
    mask = gl.KeyMask.random(gl.probe_gains(any_tiny, tokens, progress=False), 0.5)
    for fast in (True, False):
        got = Evaluator(any_tiny, fast=fast).tokens(tokens, mask)
        wanted = plain(any_tiny, tokens, ablation_hooks(any_tiny, mask))
        assert torch.allclose(got.double(), wanted, atol=1e-4)


def test_the_model_is_left_as_it_was(tiny, tiny_validation):
    before = {n: (p, p._version) for n, p in tiny.named_parameters()}
    implementation = tiny.original_model.config._attn_implementation
    evaluator = Evaluator(tiny)
    assert evaluator.fast_copy is not None
    evaluator.tokens(tiny_validation)
    after = dict(tiny.named_parameters())
    assert set(after) == set(before)
    assert all(after[n] is p and after[n]._version == v for n, (p, v) in before.items())
    assert tiny.original_model.config._attn_implementation == implementation
    assert not any(p.fwd_hooks for p in tiny.hook_dict.values())
    # The fast copy shares every tensor: it would otherwise double the memory.
    assert {p.data_ptr() for p in evaluator.fast_copy.model.parameters()} <= {
        p.data_ptr() for p in tiny.parameters()
    }


def test_hooks_of_the_user_are_honoured(tiny, tiny_validation):
    def louder(keys, hook):
        return keys * 1.5

    with attached(tiny, [("blocks.0.attn.hook_k", louder)]):
        evaluator = Evaluator(tiny)
        assert evaluator.fast_copy is None
        hooked = evaluator.tokens(tiny_validation)
    assert (hooked - Evaluator(tiny).tokens(tiny_validation)).abs().max() > 1e-3


def test_an_exception_leaves_no_edit(tiny, tiny_validation):
    fast_copy = Evaluator(tiny).fast_copy

    def broken(queries, keys, layer):
        raise RuntimeError("stop")

    from gainlens.model.forward import fast_losses

    wanted = fast_losses(fast_copy, tiny_validation)
    with pytest.raises(RuntimeError, match="stop"):
        fast_losses(fast_copy, tiny_validation, broken)
    assert torch.equal(fast_losses(fast_copy, tiny_validation), wanted)
