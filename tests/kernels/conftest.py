"""Fixtures for the kernels: every instruction set that this machine can run."""

import sys
from pathlib import Path

import pytest
from gainlens_kernels import cpu

sys.path.insert(0, str(Path(__file__).parent))


def _usable():
    if cpu.native is None:
        return []
    best = cpu.native.instruction_set()
    names = [n for n in ("avx512", "avx2", "neon", "portable") if cpu.native.set_instruction_set(n)]
    cpu.native.set_instruction_set(best)
    return names


# Without a compiler there is one variant, the reference.
@pytest.fixture(params=_usable() or ["reference"])
def instruction_set(request):
    """Run the test with each instruction set that this processor has."""
    if request.param == "reference":
        yield request.param
        return
    before = cpu.native.instruction_set()
    cpu.native.set_instruction_set(request.param)
    yield request.param
    cpu.native.set_instruction_set(before)
