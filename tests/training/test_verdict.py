"""The verdict on a trained model."""

from __future__ import annotations

import numpy as np
import pytest

from gainlens.stats.loss_rise import rise_verdict

pytestmark = pytest.mark.one_env


@pytest.mark.parametrize("scale", [0.01, 0.02, 0.04])
def test_undecided_always_says_how_many_more(scale):
    """Skewed differences: the plain t interval may be decided where the verdict's is not."""
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        rise = draw.exponential(scale, 12)
        verdict = rise_verdict(rise, 0.5, 0.02)
        seen.add(verdict.status)
        if verdict.status == "undecided":
            assert verdict.more_documents is None or verdict.more_documents >= 1
        else:
            assert verdict.more_documents == 0
    assert "undecided" in seen
