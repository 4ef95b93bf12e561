"""Stopping inside a sweep: the same verdicts on fewer documents."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted

import gainlens as gl
from gainlens.stats.intervals import t_interval


@pytest.fixture(scope="module")
def both():
    model, _, calibration, validation = planted("per_head")
    gains = gl.probe_gains(model, calibration, progress=False)
    settings = {"fractions": (0.25, 0.75), "tokens_per_batch": 160, "progress": False}
    plain = gl.surgery(model, validation, gains, **settings)
    stopped = gl.surgery(model, validation, gains, stop_margin=0.02, **settings)
    return plain, stopped


def test_same_failures_on_fewer_documents(both):
    plain, stopped = both
    statuses = [
        [curve.verdict_at(i, 0.02).status for i in range(len(curve.points))] for curve in both
    ]
    assert statuses[0] == statuses[1]
    assert set(statuses[0]) == {"fails", "undecided"}  # 16 documents: nothing can hold
    used = np.isfinite(stopped.losses).sum()
    assert used < 0.8 * plain.losses.size
    done = np.isfinite(stopped.losses)
    assert np.allclose(stopped.losses[done], plain.losses[done], atol=1e-6)


def test_its_interval_is_the_rules_own(both, tmp_path):
    _, stopped = both
    index = next(i for i, r in enumerate(stopped.table()) if r["n_documents"] < 16)
    row = stopped.table()[index]
    n = row["n_documents"]
    verdict = stopped.verdict_at(index, 0.02)
    assert verdict.interval == row["interval"]
    assert verdict.n_documents == n
    plain_width = np.subtract(*t_interval(stopped.deltas(index))[::-1])
    assert row["interval"][1] - row["interval"][0] > plain_width
    stopped.save(tmp_path / "c.json")
    again = gl.SurgeryCurve.load(tmp_path / "c.json")
    assert again.table() == stopped.table()
    assert again.verdict_at(index, 0.02) == verdict


def test_verdict_says_how_many_more(both):
    plain, _ = both
    _, high = plain.interval(0)
    middle = float(plain.deltas(0).mean())
    if middle > 0:
        verdict = plain.verdict_at(0, middle + (high - middle) / 2)
        assert verdict.status == "undecided"
        assert verdict.more_documents > 0
        assert str(verdict.more_documents) in verdict.note
    assert plain.verdict_at(1, 1e-4).more_documents == 0
    assert plain.verdict_at(1, 1e-4).status == "fails"
    with pytest.raises(gl.errors.InputError, match="method"):
        plain.interval(0, method="guess")


@pytest.mark.parametrize("margin", [0, -0.1])
def test_bad_margin(margin, tiny, tiny_validation, tiny_gains):
    with pytest.raises(gl.errors.InputError, match="margin"):
        gl.surgery(tiny, tiny_validation, tiny_gains, stop_margin=margin, progress=False)


def test_another_margin_does_not_make_four_documents_hold(both):
    """A point stopped as failing at 0.02; at 50 nats its four documents say nothing certain."""
    _, stopped = both
    index = next(i for i in range(len(stopped.points)) if len(stopped.deltas(i)) == 4)
    assert stopped.verdict_at(index, 0.02).status == "fails"
    verdict = stopped.verdict_at(index, 1e3)
    assert verdict.interval[1] < 1e3
    assert verdict.status == "undecided"
    assert verdict.more_documents == 68
