"""A killed report goes on after its last finished part, and never with parts of another report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gainlens.analysis.effective_rank import EffectiveRank
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.errors import InputError
from gainlens.report import build, reach
from gainlens.report.build import Plan, build_report
from gainlens.report.unfinished import Unfinished, packed, unpacked

pytestmark = pytest.mark.one_env
PLAN = Plan(
    "tiny", "sotu,stdlib", n_docs=4, length=48, seeds=(0,), fractions=(0.5,), damage_docs=2,
    damage_length=32, context=96, across_docs=2, task_prompts=2, task_length=120,
    evidence_docs=2,
)  # fmt: skip
STAGES = ("probe_gains", "best_cut", "surgery", "damage_by_place", "with_evidence")
PARTS = ("rise_by_position", "across_texts", "tasks_of", "side_controls", "price_of")


class Killed(BaseException):
    """As a signal: no handler of errors takes it."""


def kill(*args, **kwargs):
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    return build_report(tiny, PLAN, tmp_path_factory.mktemp("whole") / "report")


def same(found, wanted):
    """Equal, times aside."""
    apart = ("made", "seconds")
    assert {k: v for k, v in found.items() if k not in apart} == {
        k: v for k, v in wanted.items() if k not in apart
    }


def test_a_run_that_is_killed_in_every_part_gives_the_same_report(
    tiny, whole, tmp_path, monkeypatch
):
    out = tmp_path / "report"
    for module, names in ((build, STAGES[:4]), (reach, PARTS), (build, STAGES[4:])):
        for name in names:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, kill)
                with pytest.raises(Killed):
                    build_report(tiny, PLAN, out)
            assert not out.exists()
    with monkeypatch.context() as patch:  # what was done is not done again
        for name in STAGES[:4]:
            patch.setattr(build, name, kill)
        for name in PARTS:
            patch.setattr(reach, name, kill)
        found = build_report(tiny, PLAN, out)
    same(found, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["report"], "nothing is left beside it"


def test_parts_of_another_plan_or_model_are_made_again(tiny, whole, tmp_path, monkeypatch):
    out = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr(build, "damage_by_place", kill)
        with pytest.raises(Killed):
            build_report(tiny, replace(PLAN, n_docs=3), out)
    (beside,) = (p for p in tmp_path.iterdir() if p.name.endswith(".unfinished"))
    assert (beside / "surgery.json").exists()
    same(build_report(tiny, PLAN, out), whole)


def test_a_damaged_part_is_made_again(tmp_path):
    kept = Unfinished(tmp_path / "report", {"plan": 1})
    assert kept.part("damage", lambda: (1, 2.5)) == (1, 2.5)
    (kept.folder / "damage.json").write_text("{")
    again = Unfinished(tmp_path / "report", {"plan": 1})
    assert again.part("damage", lambda: (3,)) == (3,)
    assert Unfinished(tmp_path / "report", {"plan": 1}).part("damage", lambda: 0) == (3,)


def test_a_mistake_before_the_first_part_leaves_nothing(tiny, tmp_path):
    with pytest.raises(InputError):
        build_report(tiny, replace(PLAN, text="sotu", n_docs=100_000), tmp_path / "report")
    kept = Unfinished(tmp_path / "report", {})
    with pytest.raises(ZeroDivisionError):
        kept.part("damage", lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_results_survive_their_file():
    rank = EffectiveRank(
        {("query", "projected"): np.array([[0.1, np.inf], [np.nan, 3.0]])},
        {("key", "rotated"): np.arange(4, dtype=np.float32).reshape(2, 2) / 3},
        64, 100, 2,
    )  # fmt: skip
    found = unpacked(packed(rank))
    for side in ("participation", "entropy"):
        mine, other = getattr(found, side), getattr(rank, side)
        assert mine.keys() == other.keys()
        for name, values in other.items():
            assert mine[name].dtype == values.dtype
            np.testing.assert_array_equal(mine[name], values)
    with pytest.raises(TypeError, match="Evaluator is no result"):
        packed([object.__new__(Evaluator)])
    with pytest.raises(KeyError):
        unpacked({"result": "Evaluator", "fields": {}})


def test_a_report_says_what_its_parts_took(whole, tmp_path):
    assert whole["seconds"] > 0
    kept = Unfinished(tmp_path / "report", {})
    kept.part("tasks", lambda: None)
    assert Unfinished(tmp_path / "report", {}).seconds == kept.seconds > 0
    kept.done()
    assert not kept.folder.exists()
