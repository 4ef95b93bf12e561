"""The Triton kernels on NVIDIA GPUs, where Triton is installed."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def _recent(index: int) -> bool:
    # Triton makes code for Ampere (8.0) and later.
    return torch.cuda.get_device_capability(index) >= (8, 0)


def supports(q: torch.Tensor) -> bool:
    """Whether the Triton kernels support the dtype and device of this tensor."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        available()
        and q.is_cuda
        and torch.version.hip is None
        and q.dtype in dtypes
        and _recent(q.get_device())
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Run the Triton kernels on tensors that passed the checks."""
    from gainlens_kernels import triton_kernels

    # Triton launches on the current GPU, which need not be that of the tensors.
    with torch.cuda.device(q.get_device()):
        return triton_kernels.attend(q, k, v, scale, causal, lengths, starts)
