"""The GPU's ceiling of exponentials, measured: beside the tensor cores it limits prefill."""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

LANES = 1024
"""Numbers of one program, each in a chain of its own."""


@triton.jit
def chains(out, steps, LANES: tl.constexpr):
    """``out[i] = 2^-2^-2^…`` of ``steps`` exponentials: no memory is touched until the end."""
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x = lanes.to(tl.float32) * 0.0
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(out + lanes, x)


def exponential_rate(sample: Callable[[Callable[[], Any]], tuple[float, bool]]) -> float:
    """Exponentials per second, the best of a few launches that fill the GPU.

    Args:
        sample: Times a call; seconds, and whether it was disturbed.
    """
    programs = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * LANES, device="cuda")
    steps = 4096

    def call() -> None:
        chains[(programs,)](out, steps, LANES, num_warps=4)

    call()
    seconds = min(sample(call)[0] for _ in range(10))
    return programs * LANES * steps / seconds
