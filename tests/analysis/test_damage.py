"""Damage of one place at a time is what hooks in that place alone give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis.damage_by_place import damage_by_head


def hooked_loss(model, tokens, mask):
    """Plain hooks, no part of the code under test."""
    hooks = gl.ablation_hooks(model, mask)
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    flat = logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten()))


@pytest.mark.parametrize("by", ["head", "layer"])
def test_each_place_alone(any_tiny, tiny_gains, tiny_validation, by):
    mask = gl.KeyMask.loudest(tiny_gains, 0.5)
    # 64 tokens a batch: one document each, so that batches are joined too.
    found = damage_by_head(
        any_tiny, tiny_validation[:3], mask, by=by, tokens_per_batch=64, progress=False
    )
    assert found.shape == ((4, 2) if by == "head" else (4, 1))
    whole = torch.ones(mask.shape, dtype=torch.bool)
    intact = hooked_loss(any_tiny, tiny_validation[:3], gl.KeyMask(whole))
    for layer, part in ((0, 0), (2, found.shape[1] - 1), (3, 0)):
        keep = whole.clone()
        at = part if by == "head" else slice(None)
        keep[layer, at] = mask.keep[layer, at]
        wanted = hooked_loss(any_tiny, tiny_validation[:3], gl.KeyMask(keep)) - intact
        assert found[layer, part] == pytest.approx(wanted, abs=2e-5)
    assert np.abs(found).max() > 0.01


def test_nothing_cut_costs_nothing(tiny, tiny_validation):
    keep = gl.KeyMask(torch.ones(4, 2, 32, dtype=torch.bool))
    found = damage_by_head(tiny, tiny_validation[:1], keep, progress=False)
    assert np.abs(found).max() < 1e-5


def test_bad_input(tiny, tiny_validation):
    keep = gl.KeyMask(torch.ones(4, 2, 32, dtype=torch.bool))
    with pytest.raises(gl.errors.InputError, match="by='unit'"):
        damage_by_head(tiny, tiny_validation, keep, by="unit")
    with pytest.raises(gl.errors.InputError, match="cut has shape"):
        damage_by_head(tiny, tiny_validation, gl.KeyMask(keep.keep[:2]))
