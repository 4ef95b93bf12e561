"""An independent answer: one query at a time, in float64, in NumPy."""

from __future__ import annotations

import numpy as np
import torch

# Relative error (norm of the difference over norm of the answer) allowed per dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def visible(i, tq, tk, causal, start, length):
    """Slice of the keys that query i may attend to."""
    end = tk if length is None else int(length)
    if causal:
        end = min(end, end - tq + i + 1)
    begin = 0 if start is None else int(start)
    return slice(begin, max(begin, end))


def oracle(q, k, v, *, scale, causal=True, lengths=None, starts=None):
    """float64 tensor [batch, heads, tq, d_v]."""
    q64, k64, v64 = (x.detach().to(torch.float64).numpy() for x in (q, k, v))
    batch, heads, tq, _ = q64.shape
    group, tk = heads // k64.shape[1], k64.shape[2]
    out = np.zeros((batch, heads, tq, v64.shape[3]))
    with np.errstate(all="ignore"):
        for b in range(batch):
            length = None if lengths is None else lengths[b]
            start = None if starts is None else starts[b]
            for h in range(heads):
                for i in range(tq):
                    keys = visible(i, tq, tk, causal, start, length)
                    if keys.stop == keys.start:
                        continue
                    scores = k64[b, h // group, keys] @ q64[b, h, i] * scale
                    weights = np.exp(scores - scores.max())
                    out[b, h, i] = weights @ v64[b, h // group, keys] / weights.sum()
    return torch.from_numpy(out)


def relative_error(out, expected):
    """Norm of the difference over the norm of the expected tensor."""
    difference = torch.linalg.vector_norm(out.double() - expected)
    norm = torch.linalg.vector_norm(expected)
    return float(difference / norm) if norm > 0 else float(difference)


def assert_close(out, expected, dtype=None):
    """The dtype's tolerance, and the same places finite."""
    assert out.shape == expected.shape
    error = relative_error(out, expected)
    assert error <= TOLERANCE[dtype or out.dtype], f"relative error {error:.2e}"


def draw(shape, dtype, seed, layout="bhtd"):
    """A normal tensor [batch, heads, positions, width] whose memory is laid out as named."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, positions, width = shape
    if layout == "bhtd":
        return torch.randn(shape, generator=generator).to(dtype)
    if layout == "bthd":  # what a projection gives
        x = torch.randn((batch, positions, heads, width), generator=generator)
        return x.to(dtype).transpose(1, 2)
    if layout == "wide":  # a slice of a wider buffer, not aligned to anything
        x = torch.randn((batch, heads, positions, width + 5), generator=generator)
        return x.to(dtype)[..., 3 : 3 + width]
    if layout == "reversed":  # every axis but the last in another order
        x = torch.randn((positions, batch, heads, width), generator=generator)
        return x.to(dtype).permute(1, 2, 0, 3)
    assert layout == "shared"  # one head, expanded: stride 0
    x = torch.randn((batch, 1, positions, width), generator=generator)
    return x.to(dtype).expand(batch, heads, positions, width)


LAYOUTS = ("bhtd", "bthd", "wide", "reversed", "shared")
