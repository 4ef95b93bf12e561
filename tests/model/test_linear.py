"""The product of twins against float64, and where it must stay out of the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gainlens.model import linear as room
from gainlens.model.linear import linear, use_fast_linear

pytestmark = pytest.mark.one_env


@settings(deadline=None, max_examples=40)
@given(
    lead=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    sliced=st.booleans(),
    seed=st.integers(0, 999),
)
def test_agrees_with_float64(lead, width, out, bias, sliced, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(*lead, width), torch.randn(out, width)
    if sliced and lead and lead[-1] > 1:
        x = x[..., ::2, :]
    b = torch.randn(out) if bias else None
    with torch.inference_mode():
        found = linear(x, weight, b)
    wanted = torch.nn.functional.linear(
        x.double(), weight.double(), None if b is None else b.double()
    )
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= 2e-6 * float(wanted.norm()) + 1e-6


def test_gradients_go_the_usual_way():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(3, 4))


def test_other_types_go_the_usual_way(monkeypatch):
    def refuse(*args):
        raise AssertionError("not for these")

    monkeypatch.setattr(room.torch.ops.mkldnn, "_linear_pointwise", refuse)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float64):
            assert linear(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)).sum() == 24
        assert linear(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)


def test_only_plain_linear_modules_change():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), Scaled(4, 2))
    x = torch.randn(5, 3)
    with torch.inference_mode():
        before = model(x)
        use_fast_linear(model)
        assert torch.allclose(model(x), before, atol=1e-6)
    assert "forward" in vars(model[0]) and "forward" not in vars(model[1])
