"""Attention with thin keys and full values: one operator for CPU and GPU.

``sliced_attention`` computes grouped-query attention for queries and keys whose head size
differs from that of the values. It does not widen or repeat tensors, and holds nothing of size
queries × keys. ``reference`` is the same function in plain PyTorch.
"""

from gainlens_kernels.checks import SlicedAttentionError
from gainlens_kernels.op import backend, sliced_attention
from gainlens_kernels.reference import reference

__all__ = ["SlicedAttentionError", "backend", "reference", "sliced_attention"]
