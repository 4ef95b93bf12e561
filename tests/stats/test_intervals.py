"""Intervals and verdicts against scipy and by simulation with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import gainlens as gl
from gainlens.stats.intervals import (
    bootstrap_interval,
    documents_by_scaling,
    documents_to_decide,
    t_interval,
)
from gainlens.stats.stopping import StoppingRule

pytestmark = pytest.mark.one_env


def skewed(rng, n, mean, spread):
    """Differences with a long right tail, as a few documents that suffer much give."""
    return mean + spread * (rng.exponential(1.0, n) - 1.0)


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).normal(0.1, 0.05, 200)
    low, high = bootstrap_interval(values, resamples=8000)
    wanted = stats.bootstrap((values,), np.mean, n_resamples=8000, rng=1).confidence_interval
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1.5e-3)
    assert (low, high) == bootstrap_interval(values, resamples=8000)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(1)
    hits = {"t": 0, "bootstrap": 0}
    for _ in range(400):
        values = rng.normal(0.1, 0.2, 16)
        for name, (low, high) in (
            ("t", t_interval(values)),
            ("bootstrap", bootstrap_interval(values, resamples=400)),
        ):
            hits[name] += low <= 0.1 <= high
    for count in hits.values():  # 95% of 400 is 380; three standard errors are 13
        assert 364 <= count <= 396


def test_bootstrap_follows_the_skew():
    values = skewed(np.random.default_rng(2), 30, 0.0, 1.0)
    low, high = bootstrap_interval(values)
    mean = values.mean()
    assert high - mean > mean - low


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_documents(n):
    assert bootstrap_interval(np.ones(n)) == (-np.inf, np.inf)
    assert documents_to_decide(np.ones(n), 0.02) is None


def test_same_everywhere():
    assert bootstrap_interval(np.full(5, 0.3)) == (0.3, 0.3)


@pytest.mark.parametrize("bad", [{"level": 0}, {"level": 1}, {"resamples": 10}])
def test_bad_settings(bad):
    with pytest.raises(gl.InputError):
        bootstrap_interval(np.ones(4), **bad)
    with pytest.raises(gl.InputError, match="NaN"):
        bootstrap_interval(np.array([1.0, np.nan]))


def test_as_many_documents_as_promised_decide():
    rng = np.random.default_rng(3)
    first = rng.normal(0.0, 1.0, 8)
    first = 0.01 + 0.02 * (first - first.mean()) / first.std(ddof=1)
    more = documents_to_decide(first, 0.02)
    assert more > 0
    total = 8 + more

    def half_width(n):
        return stats.t.ppf(0.975, n - 1) * 0.02 / np.sqrt(n)

    assert half_width(total) < 0.01 <= half_width(total - 1)
    assert documents_to_decide(first, 1.0) == 0
    assert documents_to_decide(first - first.mean() + 0.02, 0.02) is None


LOOKS = (4, 8, 12, 16, 20, 24, 28, 32)


def run(rule, values):
    for n in rule.looks:
        status = rule.status(values[:n])
        if status != "undecided":
            return status, n
    return "undecided", len(values)


@pytest.mark.parametrize("shape", ["normal", "left", "right", "rare"])
def test_a_null_at_the_margin_is_called_holds_at_most_one_time_in_twenty(shape):
    """The true damage is the margin itself. Of 2,000 sweeps 5% are 100."""
    rule = StoppingRule(0.02, LOOKS)
    rng = np.random.default_rng(4)
    called = {"holds": 0, "fails": 0, "undecided": 0}
    for _ in range(2000):
        if shape == "normal":
            values = rng.normal(0.02, 0.03, 32)
        elif shape == "left":
            values = 0.04 - skewed(rng, 32, 0.02, 0.01)
        elif shape == "right":
            values = skewed(rng, 32, 0.02, 0.01)
        else:  # one document in five suffers much, the others agree closely
            values = 0.01 + 0.05 * (rng.random(32) < 0.2) + rng.normal(0, 0.002, 32)
        called[run(rule, values)[0]] += 1
    assert called["holds"] <= 100
    if shape == "normal":
        # By construction 2.5% either way, so not so strict that nothing is ever called.
        assert 20 < called["holds"] < 80
        assert 20 < called["fails"] < 80


def test_nothing_holds_after_a_few_documents():
    rule = StoppingRule(0.02, LOOKS)
    calm = np.random.default_rng(6).normal(0.0, 1e-4, 32)
    assert [rule.status(calm[:n]) for n in LOOKS] == ["undecided"] * 3 + ["holds"] * 5
    assert rule.interval(calm[:4])[1] < 0.02
    assert rule.status(calm[:4] + 1.0) == "fails"
    assert StoppingRule(0.02, (4, 8)).holds_from == 8  # fewer in all: the last look alone


def test_looking_without_a_plan_would_break_the_promise():
    """The same simulation with the plain interval at every look: the test above can fail."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(1000):
        values = rng.normal(0.02, 0.03, 32)
        wrong += any(t_interval(values[:n])[1] < 0.02 for n in LOOKS)
    assert wrong > 65


def test_clear_cases_stop_early_and_rightly():
    rule, rng = StoppingRule(0.02, LOOKS), np.random.default_rng(5)
    bad = [run(rule, rng.normal(2.0, 0.3, 32)) for _ in range(100)]
    good = [run(rule, rng.normal(0.0, 0.005, 32)) for _ in range(100)]
    assert all(status == "fails" for status, _ in bad)
    assert all(status == "holds" for status, _ in good)
    assert np.mean([n for _, n in bad]) <= 8
    assert np.mean([n for _, n in good]) <= 16


def test_errors_of_all_looks_add_up():
    rule = StoppingRule(0.02, LOOKS)
    for side in (0, 1):
        assert sum(rule.errors(n)[side] for n in LOOKS) == pytest.approx(0.025)
    assert rule.errors(5) is None
    assert StoppingRule(0.02, (6,)).errors(6) == pytest.approx((0.025, 0.025))
    assert StoppingRule.after_batches([2, 2, 2, 1], 0.1).looks == (4, 6, 7)
    assert StoppingRule.after_batches([3], 0.1).looks == (3,)


@pytest.mark.parametrize(
    "bad", [(0, LOOKS), (-1, LOOKS), (float("nan"), LOOKS), (0.1, ()), (0.1, (4, 4))]
)
def test_bad_rules(bad):
    with pytest.raises(gl.InputError):
        StoppingRule(*bad)


def test_scaling_an_interval_gives_students_count():
    """For a symmetric interval the two counts differ by the quantile's own change alone."""
    values = np.random.default_rng(7).normal(0.0, 1.0, 400)
    values = 0.01 + 0.2 * (values - values.mean()) / values.std(ddof=1)
    exact = documents_to_decide(values, 0.02)
    scaled = documents_by_scaling(t_interval(values), float(values.mean()), 0.02, 400)
    assert scaled == pytest.approx(exact, rel=0.01)
    assert documents_by_scaling((0.0, 0.03), 0.02, 0.02, 8) is None
    assert documents_by_scaling((-np.inf, np.inf), 0.0, 0.02, 1) is None
    assert documents_by_scaling((0.0, 0.5), 0.25, 0.375, 4) == 4 * 2**2 - 4


def test_more_documents_of_the_same_kind_do_decide():
    """The promise kept: simulated documents, as many more as were said, decide most claims."""
    rng = np.random.default_rng(8)
    decided = asked = 0
    for _ in range(200):
        first = rng.normal(0.01, 0.02, 8)
        more = documents_to_decide(first, 0.02)
        if not more or more > 400:
            continue
        asked += 1
        mean, spread = first.mean(), first.std(ddof=1)
        again = np.concatenate([first, rng.normal(mean, spread, 2 * more)])
        low, high = t_interval(again)
        decided += not low < 0.02 < high
    assert asked > 50
    assert decided > 0.6 * asked
