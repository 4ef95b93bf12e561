"""NaN, infinity, padding, and rows with nothing to attend to."""

import pytest
import torch
from gainlens_kernels import reference, sliced_attention
from oracle import draw, oracle

pytestmark = pytest.mark.one_env
NAN, INF = float("nan"), float("inf")


def both(q, k, v, **options):
    """The compiled answer, after the reference was found to agree on what is finite."""
    out = sliced_attention(q, k, v, **options)
    expected = reference(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        out.double(), oracle(q, k, v, **options), rtol=1e-5, atol=1e-6, equal_nan=True
    )
    return out


@pytest.fixture(params=[1, 3, 6, 40])
def tensors(request):
    """q, k, v with 2 heads per KV head; few rows and many take different paths."""
    q = draw((1, 2, request.param, 20), torch.float32, 1)
    return q, draw((1, 1, 60, 20), torch.float32, 2), draw((1, 1, 60, 24), torch.float32, 3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_in_a_key(instruction_set, tensors, bad):
    q, k, v = tensors
    k[0, 0, 30, 3] = bad
    both(q, k, v, scale=0.2)
    both(q, k, v, scale=0.2, causal=False)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_in_a_value(instruction_set, tensors, bad):
    q, k, v = tensors
    v[0, 0, 20, 5] = bad
    out = both(q, k, v, scale=0.2, causal=False)
    assert not out[..., 5].isfinite().any()
    assert out[..., :5].isfinite().all()
    both(q, k, v, scale=0.2)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_in_a_query(instruction_set, tensors, bad):
    q, k, v = tensors
    q[0, 1, -1, 0] = bad
    out = both(q, k, v, scale=0.2)
    assert out[0, 1, -1].isnan().all()
    assert out[0, 0].isfinite().all()


@pytest.mark.parametrize("at", [40, 59])
def test_a_later_key_never_touches_an_earlier_query(instruction_set, at):
    q = draw((1, 2, 60, 20), torch.float32, 1)
    k, v = draw((1, 1, 60, 20), torch.float32, 2), draw((1, 1, 60, 24), torch.float32, 3)
    clean = sliced_attention(q, k, v, scale=0.2)
    k[0, 0, at], v[0, 0, at] = NAN, NAN
    out = both(q, k, v, scale=0.2)
    assert torch.equal(out[:, :, :at], clean[:, :, :at])
    assert out[:, :, at:].isnan().all()


def test_padding_is_never_read(instruction_set, tensors):
    q, k, v = tensors
    bounds = {"lengths": torch.tensor([41]), "starts": torch.tensor([7])}
    clean = sliced_attention(q, k, v, scale=0.2, **bounds)
    for keys in (slice(0, 7), slice(41, None)):
        k[:, :, keys], v[:, :, keys] = NAN, INF
    out = both(q, k, v, scale=0.2, **bounds)
    assert torch.equal(out, clean)


def test_all_scores_minus_infinity(instruction_set, tensors):
    q, k, v = tensors
    q, k = q.abs(), k.abs()
    k[..., 0] = -INF
    assert both(q, k, v, scale=0.2, causal=False).isnan().all()
    # One finite score among them takes all the weight.
    k[0, 0, 50, 0] = 1.0
    out = both(q, k, v, scale=0.2, causal=False)
    torch.testing.assert_close(out, v[0, 0, 50].expand_as(out))


@pytest.mark.parametrize("tq", [1, 2, 30])
def test_nothing_to_attend_to_gives_zeros(instruction_set, tq):
    q, k, v = (draw((3, 2, n, 8), torch.float32, n) for n in (tq, 20, 20))
    lengths, starts = torch.tensor([0, 20, 5]), torch.tensor([0, 20, 5])
    assert not both(q, k, v, scale=1.0, lengths=lengths, causal=False)[0].any()
    assert not both(q, k, v, scale=1.0, lengths=lengths, starts=starts).any()
    # More queries than keys: the first ones precede every key.
    out = both(torch.randn(3, 2, 33, 8), k, v, scale=1.0)
    assert not out[:, :, :13].any()
    assert out[:, :, 13:].all()


def test_few_valid_keys_with_many_threads(instruction_set):
    # Parts of the keys that lie wholly outside of a row's bounds.
    q, k, v = (draw((2, 1, n, 8), torch.float32, n) for n in (1, 9000, 9000))
    lengths, starts = torch.tensor([3, 8999]), torch.tensor([0, 8990])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        both(q, k, v, scale=1.0, lengths=lengths)
        both(q, k, v, scale=1.0, lengths=lengths, starts=starts)
        both(q, k, v, scale=1.0, starts=starts)
    finally:
        torch.set_num_threads(before)


def test_half_precision_extremes(instruction_set):
    for dtype, big in ((torch.float16, 65504.0), (torch.bfloat16, 3.3e38)):
        k = torch.zeros(1, 1, 4, 2, dtype=dtype)
        v = torch.tensor([[[[big], [-big], [6e-8], [NAN]]]], dtype=dtype)
        q = torch.zeros(1, 1, 1, 2, dtype=dtype)
        for i in range(4):
            keys = slice(i, i + 1)
            out = sliced_attention(q, k[:, :, keys], v[:, :, keys], scale=1.0)
            assert torch.equal(out.view(torch.int16), v[:, :, keys].view(torch.int16)) or i == 3
            assert out.isnan().all() == (i == 3)
