"""Runs triton_cases.py: on the GPU where there is one, else in Triton's interpreter.

And triton_compiles.py, which compiles the kernels for a GPU that need not be there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.one_env,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheel for this system"),
]
HERE = Path(__file__).parent


def run(cases, **changes):
    environment = {**os.environ, **changes}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(HERE / cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_triton_kernels():
    run("triton_cases.py", **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))


def test_triton_kernels_compile_for_a_gpu(tmp_path):
    run("triton_compiles.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
