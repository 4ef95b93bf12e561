"""Every family that can be made slim trains at virtual width, or is refused in one line."""

from __future__ import annotations

import pytest
import torch
from slim_families import CONFIGS, NO_BRIDGE, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.errors import GainlensError, InputError
from gainlens.export import SlicePlan, slim
from gainlens.model.wrapping import to_bridge

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (4, 14), generator=torch.Generator().manual_seed(5))
OWN_ATTENTION = ("bloom", "falcon", "gptj", "gptneo", "mpt")
"""Their code does not call an attention that can be exchanged: only a bridge of them trains."""


def trained(model, plan):
    return gl.train_virtual_width(model, plan, TOKENS, steps=2, batch=2, progress=False)


def check(model, run):
    """The slim model computes what the student did."""
    student = run.student
    with torch.no_grad():
        weights = student.full()
        hidden = student.hidden(TOKENS, weights, cut=True)
        wanted = student.logits(hidden.flatten(0, 1), weights).view(*TOKENS.shape, -1)
        got = slim(model, run.plan)(TOKENS).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in NO_BRIDGE])
def test_a_bridge(name):
    hf = random_model(name)
    bridge = to_bridge(hf, name, None)
    run = trained(bridge, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    check(bridge, run)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_transformers_model(name):
    hf = random_model(name)
    plan = SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1]))
    if name.startswith(OWN_ATTENTION):
        with pytest.raises(InputError, match="can't be run by gainlens; wrap it") as caught:
            trained(hf, plan)
        assert "\n" not in str(caught.value)
        return
    check(hf, trained(hf, plan))


@pytest.mark.parametrize("name", NO_BRIDGE)
def test_a_bridge_that_can_not_be(name):
    hf = random_model(name)
    plan = SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1]))
    with pytest.raises(GainlensError, match=NO_BRIDGE[name]) as caught:
        trained(to_bridge(hf, name, None), plan)
    assert "\n" not in str(caught.value)
