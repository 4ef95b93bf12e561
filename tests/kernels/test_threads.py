"""Threads: their number, several callers at once, a forked child, and no compiled module."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from gainlens_kernels import backend, cpu, reference, sliced_attention
from oracle import draw

pytestmark = pytest.mark.one_env
needs_native = pytest.mark.skipif(cpu.native is None, reason="the kernels are not compiled")


def problem(tq=1, tk=4000):
    q = draw((1, 6, tq, 16), torch.float32, 1)
    return q, draw((1, 2, tk, 16), torch.float32, 2), draw((1, 2, tk, 32), torch.float32, 3)


@needs_native
@pytest.mark.parametrize("tq", [1, 200])
def test_the_answer_does_not_depend_on_the_number_of_threads(tq):
    tensors = problem(tq)
    expected = reference(*tensors, scale=0.25)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            out = sliced_attention(*tensors, scale=0.25)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_several_python_threads_at_once():
    tensors = problem(3)
    expected = sliced_attention(*tensors, scale=0.25)
    wrong = []

    def work():
        for _ in range(30):
            if not torch.allclose(sliced_attention(*tensors, scale=0.25), expected, atol=1e-6):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SETUP = """
import os, sys, torch
from gainlens_kernels import backend, sliced_attention, reference
torch.set_num_threads(4)
q, k, v = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 9000, 16), torch.randn(1, 2, 9000, 32)
expected = reference(q, k, v, scale=0.25)
def right():
    return torch.allclose(sliced_attention(q, k, v, scale=0.25), expected, rtol=1e-4, atol=1e-6)
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", ["openmp", "pool"])
def test_a_forked_child_neither_hangs_nor_errs(threads):
    # The parent's threads, PyTorch's included, do not exist in the child.
    code = (
        SETUP
        + """
assert right()
child = os.fork()
if child == 0:
    ok = backend().endswith("pool)") and all(right() for _ in range(20))
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if right() else 1)
    ok = ok and os.waitpid(grandchild, 0)[1] == 0
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert right()
"""
    )
    done = run(code, GAINLENS_KERNELS_THREADS=threads, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr


@needs_native
def test_own_pool():
    code = (
        SETUP
        + """
import threading
assert backend().endswith("pool)")
assert all(right() for _ in range(200))
bad = []
def work():
    bad.extend(1 for _ in range(50) if not right())
workers = [threading.Thread(target=work) for _ in range(4)]
[w.start() for w in workers]; [w.join() for w in workers]
assert not bad
"""
    )
    done = run(code, GAINLENS_KERNELS_THREADS="pool")
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_openmp_runtime():
    code = """
import torch, gainlens_kernels, gainlens_kernels._native as native, re
print(sorted(set(re.findall(r"\\S*lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))))
"""
    with_kernels = run(code).stdout
    without = run(code.replace(", gainlens_kernels, gainlens_kernels._native as native", "")).stdout
    assert with_kernels == without


def test_without_the_compiled_module_one_warning_and_the_same_answer():
    code = (
        SETUP
        + """
import warnings
assert backend() == "reference"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        assert right()
    x = q.clone().requires_grad_()
    sliced_attention(x, k, v, scale=0.25).sum().backward()
ours = [w for w in caught if "gainlens_kernels" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning
assert "\\n" not in str(ours[0].message)
"""
    )
    done = run(code, GAINLENS_KERNELS="reference")
    assert done.returncode == 0, done.stderr


def test_no_warning_with_it():
    if cpu.native is None:
        pytest.skip("the kernels are not compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliced_attention(*problem(), scale=0.25)
    assert backend().startswith("cpu (")
