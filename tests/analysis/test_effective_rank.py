"""Effective ranks against numpy on a full cache, and on planted ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.analysis.effective_rank import effective_rank


def by_hand(rows):
    """Both ranks of ``[row, dim]`` from numpy's covariance."""
    values = np.clip(np.linalg.eigvalsh(np.cov(rows, rowvar=False, bias=True)), 0, None)
    share = values / values.sum()
    share = share[share > 0]
    return 1 / (share**2).sum(), np.exp(-(share * np.log(share)).sum())


def test_ranks_are_those_of_a_full_cache(any_tiny, tiny_calibration):
    # Batches of one document, so that sums are joined.
    found = effective_rank(any_tiny, tiny_calibration, tokens_per_batch=64, progress=False)
    assert found.n_tokens == tiny_calibration.numel()
    assert found.n_documents == len(tiny_calibration)
    names = {
        ("query", "projected"): "hook_q",
        ("key", "projected"): "hook_k",
        ("query", "rotated"): "hook_rot_q",
        ("key", "rotated"): "hook_rot_k",
    }
    with torch.inference_mode():
        cache = any_tiny.run_with_cache(tiny_calibration, return_type=None)[1]
    for key, name in names.items():
        for layer, head in ((0, 0), (3, 1)):
            rows = cache[f"blocks.{layer}.attn.{name}"][:, :, head].flatten(0, 1).double().numpy()
            participation, entropy = by_hand(rows)
            assert found.participation[key][layer, head] == pytest.approx(participation, rel=1e-3)
            assert found.entropy[key][layer, head] == pytest.approx(entropy, rel=1e-3)
    assert len(found.table()) == 2 * 4 * (4 + 2)
    assert found.summary()[0]["entropy"] == pytest.approx(
        found.entropy["query", "projected"].mean()
    )


def test_a_planted_rank_is_found():
    """One direction before the rotation is one; the rotation makes a pair of it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = "LlamaForCausalLM"
    hf = hugging_face(name)
    with torch.no_grad():
        # One dimension of the first head is left.
        hf.model.layers[0].self_attn.k_proj.weight[1 : hf.config.head_dim] = 0
    model = build_bridge_from_module(hf, name, hf_config=hf.config)
    found = effective_rank(model, family_tokens(8, 12), progress=False)
    assert found.entropy["key", "projected"][0, 0] == pytest.approx(1)
    assert 1.1 < found.entropy["key", "rotated"][0, 0] <= 2.001
    assert found.entropy["key", "projected"][1, 0] > 2


def test_a_silent_rotation_is_turned_here():
    """GPT-NeoX fires no hook after its rotation: the logits tell what it did."""
    name = "GPTNeoXForCausalLM"
    model, tokens = bridge(name), family_tokens(6, 12)
    found = effective_rank(model, tokens, progress=False)
    from gainlens.model.finding_sites import key_sites

    sites = key_sites(model)
    kept = {}
    hook = ("blocks.1.attn.hook_k", lambda x, hook: kept.update(k=x.detach()))
    with torch.inference_mode():
        model.run_with_hooks(tokens, fwd_hooks=[hook], return_type=None)
    turned = sites.rotation.turn(1, 12).heads(kept["k"].float())
    participation, _ = by_hand(turned[:, :, 0].flatten(0, 1).double().numpy())
    assert found.participation["key", "rotated"][1, 0] == pytest.approx(participation, rel=1e-3)


def test_no_rotation_has_one_stage_and_one_token_no_rank():
    found = effective_rank(bridge("GPT2LMHeadModel"), family_tokens(), progress=False)
    assert {stage for _, stage in found.entropy} == {"projected"}
    with pytest.raises(gl.errors.InputError, match="at least 2"):
        effective_rank(bridge("GPT2LMHeadModel"), family_tokens(1, 1), progress=False)
