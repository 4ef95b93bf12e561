"""Small random models of every family."""

from __future__ import annotations

import pytest
import torch
from slim_families import CONFIGS, random_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small are slower on several threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def originals():
    return {name: random_model(name) for name in CONFIGS}
