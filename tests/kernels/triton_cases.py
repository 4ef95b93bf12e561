"""The Triton kernels against the float64 oracle; run by test_triton.py in its own process.

On a machine without a GPU that process sets TRITON_INTERPRET=1, which has to be there before
anything imports Triton.
"""

import pytest
import torch
from gainlens_kernels import triton_kernels
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, draw, oracle, relative_error

DEVICE = "cpu" if triton_kernels.INTERPRETED else "cuda"
pytestmark = pytest.mark.one_env
NAN, INF = float("nan"), float("inf")


def run(q, k, v, *, scale, causal=True, lengths=None, starts=None, splits=None):
    tensors = [x.to(DEVICE) for x in (q, k, v)]
    bounds = [None if x is None else x.to(DEVICE) for x in (lengths, starts)]
    return triton_kernels.attend(*tensors, scale, causal, *bounds, splits=splits).cpu()


# The interpreter takes a large fraction of a second per program: few keys, few heads.
@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([1, 2, 7, 17, 40]),
    st.integers(1, 90),
    st.sampled_from([(16, 32), (12, 20), (1, 1), (40, 8), (64, 64)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([None, 1, 2, 3]),
    st.booleans(),
    st.data(),
)
def test_against_the_oracle(heads, tq, tk, widths, dtype, causal, splits, bounded, data):
    q = draw((1, heads[0], tq, widths[0]), dtype, 1, "bthd")
    k = draw((1, heads[1], tk, widths[0]), dtype, 2, "wide")
    v = draw((1, heads[1], tk, widths[1]), dtype, 3)
    options = {"scale": widths[0] ** -0.5, "causal": causal}
    if bounded:
        options["lengths"] = torch.tensor([data.draw(st.integers(0, tk))])
        options["starts"] = torch.tensor([data.draw(st.integers(0, tk))])
    out = run(q, k, v, splits=splits, **options)
    assert relative_error(out, oracle(q, k, v, **options)) <= TOLERANCE[dtype]


def test_batches_have_their_own_bounds():
    q, k, v = (
        draw((3, 4, 1, 16), torch.float32, 1),
        *(draw((3, 2, 70, 16), torch.float32, s) for s in (2, 3)),
    )
    bounds = {"lengths": torch.tensor([0, 70, 33]), "starts": torch.tensor([0, 60, 1])}
    for splits in (1, 3):
        out = run(q, k, v, scale=0.25, splits=splits, **bounds)
        assert relative_error(out, oracle(q, k, v, scale=0.25, **bounds)) <= 2e-6
        assert not out[0].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("tq", [1, 20])
def test_nan_and_infinity(splits, bad, where, tq):
    q, k, v = (draw((1, 1, n, 16), torch.float32, n + s) for n, s in ((tq, 1), (70, 2), (70, 3)))
    {"k": k, "v": v}[where][0, 0, 66, 3] = bad
    for causal in (True, False):
        out = run(q, k, v, scale=0.3, causal=causal, splits=splits).double()
        expected = oracle(q, k, v, scale=0.3, causal=causal)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bad_values_of_a_group_between_bounds(dtype):
    q = draw((1, 4, 9, 12), dtype, 1)
    k, v = draw((1, 2, 50, 12), dtype, 2), draw((1, 2, 50, 20), dtype, 3)
    v[0, 0, 39, 19], v[0, 1, 36, 0], v[0, :, 41:], v[0, :, :3] = INF, NAN, NAN, NAN
    bounds = {"lengths": torch.tensor([41]), "starts": torch.tensor([3])}
    out, expected = run(q, k, v, scale=0.3, **bounds), oracle(q, k, v, scale=0.3, **bounds)
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 2])
def test_scores_of_minus_infinity(splits):
    q, k, v = (draw((1, 1, n, 4), torch.float32, n).abs() for n in (2, 40, 40))
    k[..., 0] = -INF
    assert run(q, k, v, scale=0.3, splits=splits).isnan().all()
    k[0, 0, 35, 0] = 1.0
    out = run(q, k, v, scale=0.3, splits=splits)
    torch.testing.assert_close(out, v[:, :, 35:36].expand_as(out))


def test_splits():
    assert triton_kernels.plan_splits(pairs=8, rows=4, tk=8192, processors=132) == 32
    assert triton_kernels.plan_splits(pairs=256, rows=4, tk=8192, processors=132) == 3
    assert triton_kernels.plan_splits(pairs=8, rows=4, tk=100, processors=132) == 1
    assert triton_kernels.plan_splits(pairs=1, rows=4096, tk=4096, processors=132) == 1
