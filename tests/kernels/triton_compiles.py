"""The Triton kernels compiled to machine code for an H100, which needs no GPU.

The interpreter runs Python: it knows nothing of types, of arguments that are turned into
constants (every integer that equals one), or of the shared memory of a multiprocessor. Run by
test_triton.py in its own process, since the interpreter is chosen when Triton is imported.
"""

import sys
from pathlib import Path

import pytest
import torch
from gainlens_kernels import triton_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.append(str(Path(__file__).parents[2] / "kernels" / "bench"))

import exponentials

SHARED_BYTES = 232448  # of an H100 multiprocessor, for one program


class Hopper:
    """The little that the compiler asks the driver of a GPU."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Stands for a kernel: compiles what it is launched with, and launches nothing."""

    def __init__(self, kernel, candidate):
        tuned = hasattr(kernel, "configs")
        self.kernel = kernel.fn if tuned else kernel
        self.config = kernel.configs[candidate].all_kwargs() if tuned else {}
        self.results = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.results.append(self.kernel.warmup(*args, grid=grid, **options, **self.config))

        return launch


NAMES = ("_prefill", "_decode", "_merge")
CASES = {
    # batch, heads, KV heads, queries, keys, d_qk, d_v, dtype, splits, bounded, candidate
    "decode": (2, 32, 8, 1, 8192, 32, 64, torch.bfloat16, 4, False, 0),
    "all that can be one is one": (1, 1, 1, 1, 1, 1, 1, torch.float16, 2, False, 0),
    "prefill": (1, 8, 2, 512, 512, 64, 128, torch.bfloat16, None, True, 0),
    "widest": (1, 2, 1, 200, 200, 256, 256, torch.float32, None, False, -1),
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_an_h100(monkeypatch, name):
    batch, heads, kv_heads, tq, tk, d_qk, d_v, dtype, splits, bounded, candidate = CASES[name]
    assert not triton_kernels.INTERPRETED
    driver.set_active(Hopper())
    kernels = [Compiled(getattr(triton_kernels, n), candidate) for n in NAMES]
    for kernel_name, kernel in zip(NAMES, kernels, strict=True):
        monkeypatch.setattr(triton_kernels, kernel_name, kernel)
    q = torch.zeros(batch, heads, tq, d_qk, dtype=dtype)
    k = torch.zeros(batch, kv_heads, tk, d_qk, dtype=dtype)
    v = torch.zeros(batch, kv_heads, tk, d_v, dtype=dtype)
    bounds = (torch.full((batch,), tk), torch.zeros(batch, dtype=torch.int64))
    triton_kernels.attend(q, k, v, 0.125, True, *(bounds if bounded else (None, None)), splits)
    results = [result for kernel in kernels for result in kernel.results]
    assert len(results) == (1 if splits is None else 2)
    for result in results:
        assert ".target sm_90" in result.asm["ptx"]
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_BYTES


def test_the_ceiling_of_exponentials_compiles():
    driver.set_active(Hopper())
    out = torch.zeros(exponentials.LANES)
    result = exponentials.chains.warmup(out, 4096, exponentials.LANES, grid=(1,), num_warps=4)
    # Eight chains in each of 128 threads, at least, and no memory but the one result.
    assert result.asm["ptx"].count("ex2.approx") >= exponentials.LANES // 128
    assert "ld.global" not in result.asm["ptx"]
