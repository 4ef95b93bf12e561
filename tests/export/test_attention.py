"""The adapter around the kernel: the same answers with and without it."""

from __future__ import annotations

import pytest
import torch

from gainlens.export import attention


def oracle(q, k, v, scale, causal, lengths, starts):
    """One query at a time, in float64."""
    batch, heads, tq, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, tq, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        end = k.shape[2] if lengths is None else int(lengths[b])
        begin = 0 if starts is None else int(starts[b])
        for h in range(heads):
            for i in range(tq):
                last = end - tq + 1 + i if causal else end
                keys = k[b, h // group, begin:last].double()
                if len(keys):
                    weights = (keys @ q[b, h, i].double() * scale).softmax(0)
                    out[b, h, i] = weights @ v[b, h // group, begin:last].double()
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tq", [1, 5, 24])
@pytest.mark.parametrize("widths", [(6, 16), (16, 6), (5, 5), (3, 1)])
@pytest.mark.parametrize("padding", [None, "lengths", "starts"])
def test_against_one_query_at_a_time(compiled, tq, widths, padding, monkeypatch):
    if compiled and attention._compiled is None:
        pytest.skip("the kernels are not installed")
    if not compiled:
        monkeypatch.setattr(attention, "_compiled", None)
    g = torch.Generator().manual_seed(tq)
    d_qk, d_v = widths
    q = torch.randn(2, 6, tq, d_qk, generator=g)
    k, v = (torch.randn(2, 3, 24, d, generator=g) for d in (d_qk, d_v))
    bounds = {"lengths": None, "starts": None}
    if padding:
        bounds[padding] = torch.tensor(
            [24, 24 if tq > 1 else 9] if padding == "lengths" else [0, 4]
        )
    for causal in (True, False):
        got = attention.sliced_attention(q, k, v, scale=0.3, causal=causal, **bounds)
        wanted = oracle(q, k, v, 0.3, causal, bounds["lengths"], bounds["starts"])
        torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=0)


def test_mask_says_no_more_than_is_needed():
    args = {"batch_size": 2, "q_length": 3, "kv_length": 8, "q_offset": 5}
    assert attention.sliced_mask(**args) is None
    ones = torch.ones(2, 8, dtype=torch.bool)
    assert attention.sliced_mask(**args, attention_mask=ones) is None
    left = ones.clone()
    left[1, :3] = False
    assert attention.sliced_mask(**args, attention_mask=left).tolist() == [0, 3]
    holes = ones.clone()
    holes[1, 2] = False
    assert attention.sliced_mask(**args, attention_mask=holes).shape == (2, 1, 3, 8)
    assert attention.sliced_mask(**args, local_size=4).shape[-2:] == (3, 8)
    # A static cache, longer than what is in it.
    static = attention.sliced_mask(batch_size=2, q_length=3, kv_length=12, q_offset=5)
    assert static[0, 0].sum(-1).tolist() == [6, 7, 8]
