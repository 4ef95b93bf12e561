"""The statistics of the prediction benchmark: against scipy, and on planted noise."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import prediction


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
        assert prediction.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert prediction.spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_within_layers_the_level_of_a_layer_does_not_count():
    rng = np.random.default_rng(1)
    layers = np.repeat(np.arange(8), 25)
    shared = rng.normal(size=200)
    a = shared + 100 * layers
    b = np.exp(shared) - 50 * layers  # opposite order of layers, same order within
    assert prediction.spearman(a, b) < -0.9
    assert prediction.inside(a, b, layers) == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [0.5, 2.0, 6.0])
def test_the_ceiling_is_what_the_true_rise_reaches(noise):
    rng = np.random.default_rng(2)
    true = rng.normal(size=3000)
    rises = true + noise * rng.normal(size=(12, 3000))
    found = prediction.reliability(rises, seed=0)
    reached = prediction.spearman(true, rises.mean(0))
    # Spearman and Brown's formula is for linear correlation; on ranks it is this close.
    assert found["ceiling"] == pytest.approx(reached, abs=0.03)
    odd = prediction.reliability(rises[:11], seed=0)
    assert odd["ceiling"] == pytest.approx(prediction.spearman(true, rises[:11].mean(0)), abs=0.03)


def test_a_single_document_has_no_ceiling():
    assert prediction.reliability(np.ones((1, 9)), 0)["ceiling"] is None


def test_the_better_score_wins_and_the_interval_holds_the_truth():
    rng = np.random.default_rng(3)
    true = rng.exponential(size=400)
    rises = true + 0.2 * rng.normal(size=(6, 400))
    scores = {
        "good": (true + 0.3 * rng.normal(size=400)).tolist(),
        "bad": rng.normal(size=400).tolist(),
    }
    layers = rng.integers(0, 4, 400).tolist()
    found = prediction.correlations(scores, rises, layers, seed=0)
    assert found["best"] == "good"
    for name, row in found["scores"].items():
        wanted = spearmanr(scores[name], rises.mean(0)).statistic
        assert row["spearman"] == pytest.approx(wanted)
        assert row["interval"][0] < wanted < row["interval"][1]
    low, high = found["scores"]["bad"]["interval"]
    assert low < 0 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.25)


def test_the_rise_of_one_unit_is_that_of_plain_hooks(tiny, tiny_validation):
    sample = [prediction.units(tiny)[i] for i in (3, 40, 100)]
    assert len(prediction.units(tiny)) == 4 * 2 * 16
    rises, _ = prediction.measured(tiny, tiny_validation[:2], sample, minutes=5)
    assert rises.shape == (2, 3)
    for column, (layer, head, *dims) in enumerate(sample):
        assert dims[1] == dims[0] + 16

        def zero(keys, hook, head=head, dims=dims):
            keys = keys.clone()
            keys[:, :, head, dims] = 0
            return keys

        for row in range(2):
            text = tiny_validation[row : row + 1]
            hooks = [(f"blocks.{layer}.attn.hook_rot_k", zero)]
            with torch.inference_mode():
                intact = tiny(text, return_type="loss")
                cut = tiny.run_with_hooks(text, return_type="loss", fwd_hooks=hooks)
            assert rises[row, column] == pytest.approx(float(cut - intact), abs=1e-5)


def test_the_first_order_estimate_is_the_slope_of_a_gate(tiny, tiny_calibration):
    """Against a gate a little below 1, in float64, where the rise is nearly linear."""
    text, step = tiny_calibration[:1, :32], 1e-3
    estimate = prediction.first_order(tiny, text)
    assert len(estimate) == len(prediction.units(tiny))
    for unit in [prediction.units(tiny)[i] for i in (5, 77, 120)]:
        layer, head, *dims = unit

        def gate(keys, hook, by=0.0, head=head, dims=dims):
            keys = keys.clone()
            keys[:, :, head, dims] *= 1 + by
            return keys

        losses = []
        for by in (-step, step):
            hooks = [(f"blocks.{layer}.attn.hook_rot_k", partial(gate, by=by))]
            with torch.inference_mode():
                logits = tiny.run_with_hooks(text, fwd_hooks=hooks).double()
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]))
        slope = float(losses[0] - losses[1]) / (2 * step)
        assert estimate[unit] == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_time_that_ran_out_ends_after_a_document(tiny, tiny_validation):
    sample = prediction.units(tiny)[:1]
    rises, spent = prediction.measured(tiny, tiny_validation[:3], sample, minutes=0)
    assert rises.shape == (1, 1)
    assert spent > 0
