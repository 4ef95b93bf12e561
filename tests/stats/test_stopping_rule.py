"""The stopping rule by simulation with known truth, and its plan of looks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from simulation import load_simulation

import gainlens as gl
from gainlens.stats.intervals import bootstrap_interval, t_interval
from gainlens.stats.stopping import StoppingRule, skew_interval
from gainlens.stats.verdicts import HOLDS_BUT_RARE

pytestmark = pytest.mark.one_env

LOOKS = tuple(range(8, 145, 8))


def run(rule, values):
    for n in rule.looks:
        status = rule.status(values[:n])
        if status != "undecided":
            return status, n
    return "undecided", len(values)


@pytest.mark.parametrize("shape", ["normal", "exponential", "one in ten"])
def test_a_null_at_the_margin_is_rarely_called_anything(shape):
    """The true damage is the margin itself. At 95% each word is wrong 2.5 times in a hundred.

    Of 400 sweeps that is 10; 20 is three standard errors more. One that calls "holds" at any look
    by the plain interval is wrong in a sixth of all sweeps (the test below). The simulation's
    decisions are the rule's: ``test_verdicts.py``.
    """
    made = load_simulation()
    rule = StoppingRule(1.0, LOOKS, level=0.95)
    drawn = made.SHAPES[shape](np.random.default_rng(4), (400, 144)) + 1.0
    status, _ = made.decisions(rule, list(made.ends_at_looks(rule, drawn, np.ones(144))), 1.0)
    assert (status == 1).sum() <= 20
    assert (status == -1).sum() <= 20
    if shape == "normal":  # not so strict that nothing is ever called
        assert (status != 0).sum() >= 4


def test_looking_without_a_plan_would_break_the_promise():
    """The same simulation with the plain interval at every look: the test above can fail."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(300):
        values = rng.normal(1.0, 1.0, 144)
        wrong += any(t_interval(values[:n])[1] < 1.0 for n in LOOKS)
    assert wrong > 25


def test_nothing_holds_below_the_guard():
    """However calm the documents are: a rare harm has not had its chance to show."""
    rule = StoppingRule(0.02, LOOKS)
    calm = np.random.default_rng(6).normal(0.0, 1e-4, 144)
    assert [rule.status(calm[:n]) for n in LOOKS[:8]] == ["undecided"] * 8
    assert rule.status(calm[:72]) == "holds"
    assert rule.status(calm[:8] + 1.0) == "fails"
    for total, wanted in ((32, "undecided"), (40, HOLDS_BUT_RARE), (72, "holds")):
        short = StoppingRule(0.02, tuple(range(8, total + 1, 8)))
        assert run(short, calm[:total]) == (wanted, total)


def test_windows_of_one_text_do_not_reach_the_guard():
    rule = StoppingRule(0.02, LOOKS)
    calm = np.random.default_rng(6).normal(0.0, 1e-4, 144)
    texts = np.arange(144) // 4
    assert rule.status(calm[:72], groups=texts[:72]) == "undecided"
    assert rule.status(calm, groups=texts) == HOLDS_BUT_RARE


def test_clear_cases_stop_early_and_rightly():
    rule, rng = StoppingRule(0.02, LOOKS), np.random.default_rng(5)
    bad = [run(rule, rng.normal(2.0, 0.3, 144)) for _ in range(20)]
    good = [run(rule, rng.normal(0.0, 0.005, 144)) for _ in range(4)]
    assert {status for status, _ in bad} == {"fails"}
    assert set(good) == {("holds", 72)}
    assert np.mean([n for _, n in bad]) <= 10


def test_errors_of_all_looks_add_up():
    for looks in (LOOKS, (*LOOKS, 150, 300), (8, 16), (80,)):
        rule = StoppingRule(0.02, looks)
        for side in (0, 1):
            assert sum(rule.errors(n)[side] for n in looks) == pytest.approx(0.005)
        assert rule.errors(5) == (0.0, 0.0)
    assert StoppingRule(0.02, LOOKS).holds_looks == (72, 144)
    assert StoppingRule(0.02, (50, 100, 140, 150, 290, 300)).holds_looks == (100, 150, 290, 300)
    assert StoppingRule(0.02, (8, 16)).holds_looks == (16,)
    assert StoppingRule.after_batches([2, 2, 2, 1], 0.1).looks == (4, 6, 7)
    assert StoppingRule.after_batches([3], 0.1).looks == (3,)


def test_one_look_is_the_plain_rule():
    values = np.random.default_rng(9).exponential(0.01, 80)
    rule = StoppingRule(0.02, (80,))
    assert rule.interval(values) == bootstrap_interval(values, 0.99)


def test_an_undecided_point_names_the_next_look():
    rule = StoppingRule(0.02, LOOKS)
    calm = np.random.default_rng(6).normal(0.0, 1e-4, 144)
    verdict = rule.judge("it is flat", calm[:8], early=True)
    assert verdict.status == "undecided"
    assert verdict.more_documents == 64
    assert verdict.note == (
        "stopped early; interval over 18 planned looks; some 64 more documents would decide it"
    )
    assert rule.judge("it is flat", calm).more_documents == 0


def test_johnsons_correction():
    """By its formula (Johnson 1978), written out."""
    x = np.random.default_rng(10).exponential(1.0, 12)
    n, s, q = 12, x.std(ddof=1), stats.t.ppf(0.975, 11)
    shift = stats.skew(x, bias=False) * s * (1 + 2 * q**2) / (6 * n)
    low, high = skew_interval(x, 0.95)
    assert low == pytest.approx(x.mean() - q * s / np.sqrt(n))
    assert high == pytest.approx(x.mean() + q * s / np.sqrt(n) + shift)


@pytest.mark.parametrize(
    "bad", [(0, LOOKS), (-1, LOOKS), (float("nan"), LOOKS), (0.1, ()), (0.1, (4, 4))]
)
def test_bad_rules(bad):
    with pytest.raises(gl.errors.InputError):
        StoppingRule(*bad)
