"""Healing in a process that has turned gradients off."""

from __future__ import annotations

import copy

import pytest
import torch

import gainlens as gl
from gainlens.export import SlicePlan
from gainlens.model.loading import load_hf

pytestmark = pytest.mark.one_env


def test_gradients_turned_off_for_the_process():
    tokens = torch.randint(3, 900, (4, 16), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(4, 2, 32, dtype=torch.bool)
    keep[..., :8] = keep[..., 16:24] = True
    first = load_hf("tiny")
    second = copy.deepcopy(first)
    settings = {"steps": 2, "batch": 2, "lr": 1e-3, "progress": False}
    gl.train_virtual_width(first, SlicePlan(keep), tokens, **settings)
    torch.set_grad_enabled(False)
    try:
        gl.train_virtual_width(second, SlicePlan(keep), tokens, **settings)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    changed = load_hf("tiny").state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    key = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(changed[key], first.state_dict()[key])
