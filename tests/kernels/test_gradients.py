"""Gradients against float64 autograd through an independent formula."""

import pytest
import torch
from gainlens_kernels import sliced_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import draw, relative_error

pytestmark = pytest.mark.one_env


def plain(q, k, v, scale, causal, lengths=None, starts=None):
    """Textbook attention in the dtype of its inputs, keys repeated, by autograd."""
    group, tq, tk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    key, query = torch.arange(tk), torch.arange(tq)[:, None]
    rows = []
    for b in range(q.shape[0]):
        end = tk if lengths is None else int(lengths[b])
        begin = 0 if starts is None else int(starts[b])
        seen = (key < end) & (key >= begin) & ((key <= query + end - tq) | (not causal))
        weights = torch.softmax(scores[b].masked_fill(~seen, -1e300), -1) * seen
        rows.append(weights @ v[b])
    return torch.stack(rows)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([1, 5, 33]),
    st.sampled_from([1, 16, 40]),
    st.sampled_from([(16, 32), (12, 20), (1, 1), (32, 8)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.booleans(),
)
def test_against_float64(heads, tq, tk, widths, dtype, causal, bounded):
    q = draw((2, heads[0], tq, widths[0]), dtype, 1, "bthd")
    k = draw((2, heads[1], tk, widths[0]), dtype, 2, "bthd")
    v = draw((2, heads[1], tk, widths[1]), dtype, 3)
    g = draw((2, heads[0], tq, widths[1]), dtype, 4)
    bounds = {}
    if bounded:
        bounds = {"lengths": torch.tensor([tk, tk // 2]), "starts": torch.tensor([tk // 3, 0])}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    sliced_attention(*inputs, scale=0.3, causal=causal, **bounds).backward(g)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain(*exact, 0.3, causal, **bounds).backward(g.double())
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
    # Where a gradient vanishes (one key: weights don't move) there is only rounding to compare.
    floor = 1e-6 if dtype == torch.float32 else 1e-13
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad.dtype == dtype
        if y.grad.norm() > floor:
            assert relative_error(x.grad, y.grad) <= tolerance
        else:
            assert x.grad.double().norm() < 1e-5


def test_gradcheck_through_the_operator():
    q, k, v = (
        draw(s, torch.float64, 1).requires_grad_()
        for s in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3))
    )
    assert torch.autograd.gradcheck(lambda *x: sliced_attention(*x, scale=0.5), (q, k, v))


def test_padding_gets_no_gradient_even_when_it_is_nan():
    q, k, v = (draw((1, 2, 6, 8), torch.float32, s) for s in (1, 2, 3))
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("inf")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sliced_attention(*inputs, scale=0.5, causal=False, lengths=torch.tensor([4])).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not k.grad[:, :, 4:].any()
    assert not v.grad[:, :, 4:].any()
    assert v.grad[:, :, :4].all()


def test_no_gradient_where_none_is_asked():
    q, k, v = (draw((1, 1, 4, 8), torch.float32, s) for s in (1, 2, 3))
    out = sliced_attention(q, k, v.requires_grad_(), scale=0.5)
    out.sum().backward()
    assert q.grad is None
    assert v.grad is not None
    with torch.no_grad():
        assert not sliced_attention(q, k, v, scale=0.5).requires_grad


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("tq", [0, 3])
def test_of_nothing(batch, tq):
    shapes = ((batch, 4, tq, 8), (batch, 2, 5, 8), (batch, 2, 5, 6))
    inputs = [torch.zeros(s).requires_grad_() for s in shapes]
    sliced_attention(*inputs, scale=0.5).sum().backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def test_a_second_gradient_is_refused():
    q, k, v = (draw((1, 1, 4, 8), torch.float64, s).requires_grad_() for s in (1, 2, 3))
    (first,) = torch.autograd.grad(
        sliced_attention(q, k, v, scale=0.5).square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second gradient"):
        first.sum().backward()
