"""Runs triton_cases.py: on the GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.one_env


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheel for this system")
def test_triton_kernels():
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    cases = Path(__file__).parent / "triton_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:xdist", str(cases)]
    environment["PYTHONPATH"] = os.pathsep.join([str(cases.parent), *filter(None, sys.path)])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
