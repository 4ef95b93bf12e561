"""The figures show the numbers that they are given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gainlens as gl
from gainlens.analysis.behaviour_curves import BehaviourRow
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.analysis.sweep.points import Point
from gainlens.plots import curves

Behaviours = gl.analysis.Behaviours


@pytest.fixture
def curve(tiny_gains):
    points = [
        Point(score, "head", "pair", "zero", "quietest", f)
        for score in ("qk", "rms")
        for f in (0.25, 0.5)
    ] + [Point("qk", "head", "pair", "zero", "random", 0.5, s) for s in (0, 1)]
    losses = 3 + np.array([[0.1, 0.2], [0.3, 0.5], [0.2, 0.4], [0.9, 1.1], [2, 2.2], [3, 3.4]])
    return SurgeryCurve(points, losses, np.full(2, 3.0), tiny_gains.model, "text", 100)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_curve(curve):
    ax = curve.plot(margin=0.02)
    labels = ax.get_legend_handles_labels()[1]
    assert labels == [
        "margin 0.02",
        "quietest, qk, head",
        "quietest, rms, head",
        "random (control)",
    ]
    drawn = {c.get_label(): c.lines[0].get_ydata() for c in ax.containers}
    assert drawn["quietest, qk, head"] == pytest.approx([0.15, 0.4])
    assert drawn["random (control)"] == pytest.approx([2.65])


def test_table_of_scores(curve):
    ax = curves.plot_scores(curve)
    assert [t.get_text() for t in ax.texts] == ["0.150", "0.400", "0.300", "1.000"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["qk, head", "rms, head"]


def test_heat_maps():
    damage = np.array([[0.1, -0.2], [0.3, np.nan]])
    image = curves.plot_damage(damage).images[0]
    assert image.get_array()[1, 0] == 0.3
    effect = np.arange(12.0).reshape(2, 2, 3)
    effects = gl.analysis.PatchEffects(effect, 1.0, 0.0, (0, 1, 2), "pair", "exact")
    assert np.array_equal(effects.plot().images[0].get_array(), effect.reshape(4, 3))
    assert effects.largest(1) == [(1, 1, 2, 11.0)]
    assert np.array_equal(effects.normalised, effect)


def test_behaviours_show_chance():
    rows = [
        BehaviourRow("copying", f, order, None, 8, value, 0.01, 0.125)
        for f, order, value in ((0.0, "intact", 0.9), (0.5, "quietest", 0.4))
    ]
    (ax,) = Behaviours(rows, {}).plot()
    assert any(line.get_ydata()[0] == 0.125 for line in ax.lines if line.get_linestyle() == "--")
    assert ax.get_title() == "copying, 8 back"
