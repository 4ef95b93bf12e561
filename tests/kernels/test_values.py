"""The operator against the float64 oracle over drawn shapes, strides and dtypes."""

from functools import cache

import numpy as np
import pytest
import torch
from gainlens_kernels import reference, sliced_attention
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, assert_close, draw, oracle

pytestmark = pytest.mark.one_env
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def problems(draw_, max_keys=700):
    """Sizes around the edges of vectors, tiles and blocks, with any masks."""
    edges = st.sampled_from([1, 2, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 49, 64, 65])
    widths = edges | st.integers(1, 256)
    batch = draw_(st.integers(1, 3))
    kv_heads, group = draw_(st.integers(1, 3)), draw_(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 13]))
    tq = draw_(st.just(1) | edges)
    tk = draw_(edges | st.integers(1, max_keys) | st.sampled_from([127, 128, 129, 256, 257]))
    lengths, starts = None, None
    if draw_(st.booleans()):
        lengths = draw_(st.lists(st.integers(0, tk), min_size=batch, max_size=batch))
    if draw_(st.integers(0, 3)) == 0:
        starts = draw_(st.lists(st.integers(0, tk), min_size=batch, max_size=batch))
    return {
        "batch": batch,
        "heads": (kv_heads * group, kv_heads),
        "tq": tq,
        "tk": tk,
        "widths": (draw_(widths), draw_(widths)),
        "dtype": draw_(st.sampled_from(DTYPES)),
        "layouts": draw_(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        "causal": draw_(st.booleans()),
        "lengths": lengths,
        "starts": starts,
        "seed": draw_(st.integers(0, 2**16)),
        "threads": draw_(st.integers(1, 4)),
        "index": draw_(st.sampled_from([torch.int64, torch.int32])),
    }


def build(p):
    heads, kv_heads = p["heads"]
    d_qk, d_v = p["widths"]
    q = draw((p["batch"], heads, p["tq"], d_qk), p["dtype"], p["seed"], p["layouts"][0])
    k = draw((p["batch"], kv_heads, p["tk"], d_qk), p["dtype"], p["seed"] + 1, p["layouts"][1])
    v = draw((p["batch"], kv_heads, p["tk"], d_v), p["dtype"], p["seed"] + 2, p["layouts"][2])
    options = {"scale": d_qk**-0.5, "causal": p["causal"]}
    for name in ("lengths", "starts"):
        if p[name] is not None:
            options[name] = torch.tensor(p[name], dtype=p["index"])
    return (q, k, v), options


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SETTINGS
@given(problems())
def test_compiled(instruction_set, threads, p):
    threads(p["threads"])
    tensors, options = build(p)
    out = sliced_attention(*tensors, **options)
    assert out.is_contiguous()
    assert out.dtype == p["dtype"]
    assert_close(out, oracle(*tensors, **options))


@SETTINGS
@given(problems(max_keys=200))
def test_reference(p):
    tensors, options = build(p)
    assert_close(reference(*tensors, **options), oracle(*tensors, **options))
    exact = [x.double() for x in tensors]
    torch.testing.assert_close(
        reference(*exact, **options), oracle(*tensors, **options), rtol=1e-11, atol=1e-12
    )


@cache
def long_problem(dtype, tq, widths, keys):
    q = draw((1, 2, tq, widths[0]), dtype, 1)
    k = draw((1, 1, keys, widths[0]), dtype, 2)
    v = draw((1, 1, keys, widths[1]), dtype, 3)
    options = {"scale": widths[0] ** -0.5}
    return (q, k, v), options, oracle(q, k, v, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tq", [1, 3, 14])
@pytest.mark.parametrize("widths", [(64, 64), (12, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("keys", [16, 32768])
def test_error_does_not_grow_with_the_keys(instruction_set, dtype, tq, widths, keys):
    tensors, options, expected = long_problem(dtype, tq, widths, keys)
    assert_close(sliced_attention(*tensors, **options), expected)


@pytest.mark.parametrize("widths", [(64, 64), (12, 64), (128, 128)])
@pytest.mark.parametrize("keys", [16, 32768])
def test_error_is_small_where_few_keys_take_all(instruction_set, widths, keys):
    """Scores of a standard deviation of 3 to 11: a handful of keys gets nearly all the weight."""
    (q, k, v), _, _ = long_problem(torch.float32, 3, widths, keys)
    out = sliced_attention(q, k, v, scale=1.0)
    assert_close(out, oracle(q, k, v, scale=1.0))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 3.0])
def test_scales(instruction_set, scale):
    q, k, v = (
        draw((1, 4, 9, 16), torch.float32, 1),
        *(draw((1, 2, 50, 16), torch.float32, s) for s in (2, 3)),
    )
    assert_close(sliced_attention(q, k, v, scale=scale), oracle(q, k, v, scale=scale))


def test_a_scale_from_numpy():
    q, k, v = (draw((1, 1, 3, 8), torch.float32, s) for s in (1, 2, 3))
    expected = sliced_attention(q, k, v, scale=0.25)
    assert torch.equal(sliced_attention(q, k, v, scale=np.float32(0.25)), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_views_that_negate(which):
    # PyTorch keeps the sign of such a view apart from its memory.
    tensors = [draw((1, 1, 5, 8), torch.float32, s) for s in (1, 2, 3)]
    expected = [-x if i == which else x for i, x in enumerate(tensors)]
    tensors[which] = torch._neg_view(tensors[which])
    out = sliced_attention(*tensors, scale=0.3)
    assert torch.equal(out, sliced_attention(*expected, scale=0.3))


@pytest.mark.parametrize("tq", [1, 20])
def test_large_scores_do_not_overflow(instruction_set, tq):
    q, k, v = (draw((1, 1, n, 8), torch.float32, s) for n, s in ((tq, 1), (300, 2), (300, 3)))
    # Scores of several thousands: exponentials would overflow without the running maximum. The
    # powers of two keep the products exact, so that rounding of the scores is not what differs.
    q, k = (q * 16).round() * 4, (k * 16).round()
    out = sliced_attention(q, k, v, scale=1.0)
    assert_close(out, oracle(q, k, v, scale=1.0))


def test_a_row_of_queries_equals_its_rows(instruction_set):
    q, k, v = (
        draw((2, 6, 70, 24), torch.float32, 1),
        *(draw((2, 2, 150, w), torch.float32, w) for w in (24, 40)),
    )
    whole = sliced_attention(q, k, v, scale=0.2)
    for i in (0, 1, 33, 69):
        one = sliced_attention(q[:, :, i : i + 1], k[:, :, : 81 + i], v[:, :, : 81 + i], scale=0.2)
        torch.testing.assert_close(whole[:, :, i : i + 1], one, rtol=2e-5, atol=2e-6)


def test_strides_beyond_32_bits(instruction_set):
    # Only the pages that are touched take memory.
    row = 2**31 + 64
    keys = torch.empty(2 * row + 8, dtype=torch.bfloat16)
    k = keys.as_strided((1, 1, 3, 8), (0, 0, row, 1))
    q, v = draw((1, 1, 2, 8), torch.bfloat16, 1), draw((1, 1, 3, 4), torch.bfloat16, 2)
    k.copy_(draw((1, 1, 3, 8), torch.bfloat16, 3))
    assert_close(sliced_attention(q, k, v, scale=0.3), oracle(q, k, v, scale=0.3))


def test_more_keys_than_32_bits_count(instruction_set):
    # One row of memory, expanded; five of the keys are valid.
    q, k, v = (draw((1, 1, n, 256), torch.float32, n) for n in (3, 1, 1))
    keys, values = k.expand(1, 1, 2**40, 256), v.expand(1, 1, 2**40, 256)
    options = {"scale": 0.1, "causal": False, "lengths": torch.tensor([5])}
    out = sliced_attention(q, keys, values, **options)
    torch.testing.assert_close(out, v.expand_as(out))


def test_empty_batch_and_empty_queries():
    k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 5)
    assert sliced_attention(torch.randn(2, 3, 0, 8), k, v, scale=1.0).shape == (2, 3, 0, 5)
    empty = sliced_attention(torch.randn(0, 3, 2, 8), k[:0], v[:0], scale=1.0)
    assert empty.shape == (0, 3, 2, 5)


@example(0)
@example(37)
@SETTINGS
@given(st.integers(0, 40))
def test_left_padding_equals_the_shorter_row(pad):
    q, k, v = (draw((1, 2, n, 16), torch.float32, n) for n in (41, 41, 41))
    out = sliced_attention(q, k, v, scale=0.3, starts=torch.tensor([pad]))
    short = sliced_attention(q[:, :, pad:], k[:, :, pad:], v[:, :, pad:], scale=0.3)
    torch.testing.assert_close(out[:, :, pad:], short, rtol=2e-5, atol=2e-6)
    assert not out[:, :, :pad].any()
