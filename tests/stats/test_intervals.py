"""Intervals and verdicts against scipy and by simulation with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import gainlens as gl
from gainlens.stats.intervals import (
    bootstrap_chances,
    bootstrap_interval,
    documents_by_scaling,
    t_interval,
)

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
    assert bootstrap_chances(np.ones(n), 0.02) == (1.0, 1.0)


def test_same_everywhere():
    assert bootstrap_interval(np.full(5, 0.3)) == (0.3, 0.3)


@pytest.mark.parametrize("bad", [{"level": 0}, {"level": 1}, {"resamples": 10}])
def test_bad_settings(bad):
    with pytest.raises(gl.errors.InputError):
        bootstrap_interval(np.ones(4), **bad)
    with pytest.raises(gl.errors.InputError, match="NaN"):
        bootstrap_interval(np.array([1.0, np.nan]))


def plain_bootstrap(values, labels, level, resamples=4000, seed=0):
    """The same interval drawn group by group in a loop, with nothing but means and sums."""
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(labels))
    members = [values[[label == name for label in labels]] for name in names]
    n, mean = len(names), values.mean()

    def spread(parts, about):
        total = sum(map(len, parts))
        return np.sqrt(sum((p - about).sum() ** 2 for p in parts) * n / (n - 1)) / total

    ratios = []
    for picks in rng.integers(0, n, (resamples, n)):
        parts = [members[i] for i in picks]
        again = np.concatenate(parts)
        ratios.append((again.mean() - mean) / spread(parts, again.mean()))
    low = np.quantile(ratios, 0.5 - level / 2, method="lower")
    high = np.quantile(ratios, 0.5 + level / 2, method="higher")
    whole = spread(members, mean)
    return mean - high * whole, mean - low * whole


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_against_a_loop_over_resamples(grouped):
    rng = np.random.default_rng(11)
    values = rng.exponential(1.0, 40)
    labels = [int(i) for i in rng.integers(0, 12, 40)] if grouped else list(range(40))
    got = bootstrap_interval(values, 0.9, groups=labels if grouped else None)
    assert got == pytest.approx(plain_bootstrap(values, labels, 0.9), rel=1e-9)


def test_windows_of_one_text_count_as_one():
    """Four copies of each document say no more than one; without labels they would seem to."""
    values = np.random.default_rng(12).exponential(1.0, 40)
    copies, labels = np.repeat(values, 4), np.repeat(np.arange(40), 4)
    alone = bootstrap_interval(values, 0.99)
    assert bootstrap_interval(copies, 0.99, groups=labels) == pytest.approx(alone)
    low, high = bootstrap_interval(copies, 0.99)
    assert high - low < 0.7 * (alone[1] - alone[0])
    with pytest.raises(gl.errors.InputError, match="3 labels for 40 documents"):
        bootstrap_interval(values, groups=[1, 2, 3])


def test_a_rare_harm_is_not_drawn_away():
    """One document in 72 suffers: a third of all resamples show nothing of it and no spread.

    The upper end was below 0.05 when those resamples were left out.
    """
    harm = np.zeros(72)
    harm[5] = 1.0
    assert bootstrap_interval(harm, 0.99)[1] == np.inf
    assert bootstrap_interval(harm + 0.02, 0.99)[1] == np.inf


def test_chances_belong_to_the_interval():
    values = np.random.default_rng(13).exponential(1.0, 50)
    low, high = bootstrap_interval(values, 0.9)
    for end, side in ((high, 0), (low, 1)):
        inside, outside = (bootstrap_chances(values, end + step)[side] for step in (-1e-6, 1e-6))
        assert {inside < 0.0502, outside < 0.0502} == {True, False}
    assert bootstrap_chances(np.ones(9), 2.0) == (0.0, 1.0)


def test_scaling_an_interval_gives_students_count():
    """For a symmetric interval the two counts differ by the quantile's own change alone."""
    values = np.random.default_rng(7).normal(0.0, 1.0, 400)
    values = 0.01 + 0.2 * (values - values.mean()) / values.std(ddof=1)
    more = documents_by_scaling(t_interval(values), float(values.mean()), 0.02, 400)
    half = stats.t.ppf(0.975, 400 + more - 1) * 0.2 / np.sqrt(400 + more)
    assert half == pytest.approx(0.01, rel=0.01)
    assert documents_by_scaling((0.0, 0.03), 0.02, 0.02, 8) is None
    assert documents_by_scaling((-np.inf, np.inf), 0.0, 0.02, 1) is None
    assert documents_by_scaling((0.0, 0.5), 0.25, 0.375, 4) == 4 * 2**2 - 4
    assert documents_by_scaling((0.0, 0.01), 0.005, 0.02, 8) == 0


def test_more_documents_of_the_same_kind_do_decide():
    """The promise kept: simulated documents, as many more as were said, decide most claims."""
    rng = np.random.default_rng(8)
    decided = asked = 0
    for _ in range(200):
        first = rng.normal(0.01, 0.02, 8)
        more = documents_by_scaling(t_interval(first), float(first.mean()), 0.02, 8)
        if not more or more > 400:
            continue
        asked += 1
        mean, spread = first.mean(), first.std(ddof=1)
        again = np.concatenate([first, rng.normal(mean, spread, 2 * more)])
        low, high = t_interval(again)
        decided += not low < 0.02 < high
    assert asked > 50
    assert decided > 0.6 * asked
