"""The one estimate of the time that a report still takes."""

from __future__ import annotations

import pytest

from gainlens.analysis.sweep.points import ORDERS, sweep_points
from gainlens.report.build import Plan
from gainlens.report.progress import Stages, stage_costs

pytestmark = pytest.mark.one_env


@pytest.mark.parametrize(("seeds", "fractions"), [((0,), (0.5,)), ((0, 1, 2), (0.25, 0.6))])
def test_the_sweep_costs_its_points_and_the_intact_pass(seeds, fractions):
    plan = Plan("tiny", "sotu", n_docs=5, length=40, seeds=seeds, fractions=fractions,
                refit_rounds=0)  # fmt: skip
    names = ("qk",), ("head",), "pair", "zero"
    points = sweep_points(plan.all_fractions, ORDERS, seeds, *names)
    costs = stage_costs(plan, (4, 2, 32))
    assert costs["surgery"] == (len(points) + 1) * 5 * 40
    assert costs["probe"] == 5 * 40 and costs["refit"] == 0


def test_the_bar_shows_the_share_of_the_whole_and_its_stage(capsys):
    stages = Stages({"probe": 1.0, "surgery": 2.0, "map": 1.0})
    shares = []
    for name in ("probe", "surgery", "map"):
        with stages.stage(name):
            pass
        stages._bar.refresh()
        shares.append(capsys.readouterr().err.rpartition("\r")[2])
    stages.close()
    for shown, name, share, number in zip(
        shares, ("probe", "surgery", "map"), ("25%", "75%", "100%"), (1, 2, 3), strict=True
    ):
        assert f"stage {number} of 3 ({name})" in shown and f"{share} done" in shown
        assert "left" in shown


def test_a_stage_that_fails_is_not_counted(capsys):
    stages = Stages({"probe": 1.0, "map": 1.0})
    with pytest.raises(ValueError, match="no"), stages.stage("probe"):
        raise ValueError("no")
    assert stages._bar.n == 0
    stages.close()
