"""The small random models of the slim families, which live with the tests of the export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "export"))


@pytest.fixture(scope="session")
def originals():
    from slim_families import random_model

    return {name: random_model(name) for name in ("qwen3", "gpt2")}
