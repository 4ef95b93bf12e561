"""Behaviours on sequences whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gainlens as gl
from gainlens.analysis import behaviour_curves as module
from gainlens.analysis.sweep.evaluator import Evaluator


def test_copying_prompts_hold_what_they_say():
    pool = torch.arange(100, 200)
    rows = module.random_rows(pool, 5, 30, torch.Generator().manual_seed(0))
    for distance in (2, 7, 20):
        prompt, candidates = module.copying_prompts(rows, distance)
        key = prompt[:, -1]
        assert torch.equal(prompt[:, -1 - distance], key)
        assert torch.equal(prompt[:, -distance], candidates[:, 0])
        assert candidates.shape == (5, module.CANDIDATES)
        for p, c in zip(prompt.tolist(), candidates.tolist(), strict=True):
            assert len(set(c)) == module.CANDIDATES
            assert set(c) <= set(p)
            assert len(set(p)) == len(p) - 1  # the key alone occurs twice


def test_scores_of_a_perfect_and_of_a_blind_model():
    tokens = torch.tensor([[3, 1, 4, 2, 3, 1, 4, 2]])
    perfect = torch.nn.functional.one_hot(tokens.roll(-1, 1), 6).float()
    assert module.induction_score(perfect, tokens).tolist() == [1.0]
    assert module.induction_score(-perfect, tokens).tolist() == [0.0]
    candidates = torch.tensor([[2, 5], [2, 5]])
    last = torch.tensor([[0, 0, 9, 0, 0, 1.0], [0, 0, 1, 0, 0, 9.0]])
    assert module.copying_score(last, candidates).tolist() == [1.0, 0.0]


@pytest.fixture(scope="module")
def result(tiny, tiny_validation, tiny_gains):
    keep = torch.ones(tiny_gains.shape, dtype=torch.bool)
    keep[..., 0] = False
    return gl.behaviours(
        tiny,
        tiny_validation[:3],
        tiny_gains,
        (0.5,),
        distances=(2, 8),
        n_sequences=4,
        repeat=8,
        cuts={"one dim": gl.KeyMask(keep)},
        progress=False,
    )


def test_every_figure_is_there_with_its_chance(result):
    kinds = {(r.behaviour, r.distance) for r in result.rows}
    expected = {("induction", None), ("copying", 2), ("copying", 8), ("agreement", None)}
    assert kinds == expected | {("kl", None), ("loss", None)}
    orders = {(r.order, r.label) for r in result.rows}
    assert orders == {("intact", None), ("quietest", None), ("random", None), ("given", "one dim")}
    assert len(result.rows) == 4 * 6
    for row in result.rows:
        assert row.chance >= 0
        if row.behaviour not in ("kl", "loss"):
            assert 0 <= row.value <= 1
    assert result.find(behaviour="copying")[0].chance == 1 / 8


def test_the_intact_model_agrees_with_itself(result, tiny, tiny_validation, tiny_gains):
    (agreement,) = result.find(behaviour="agreement", order="intact")
    (kl,) = result.find(behaviour="kl", order="intact")
    assert agreement.value == 1
    assert kl.value == pytest.approx(0, abs=1e-9)
    (cut,) = result.find(behaviour="kl", order="random")
    mask = gl.KeyMask.random(tiny_gains, 0.5, 0)
    evaluator, found = Evaluator(tiny), []
    for document in tiny_validation[:3]:
        a, b = (evaluator.logits(document[None], m)[0].log_softmax(-1) for m in (None, mask))
        found.append(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum") / len(a))
    assert cut.value == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)
    assert cut.value > 1e-3
    assert result.to_json()["rows"] == result.table()


@pytest.mark.parametrize("bad", [{"distances": (1,)}, {"repeat": 1}, {"n_sequences": 1}])
def test_bad_input(tiny, tiny_validation, tiny_gains, bad):
    with pytest.raises(gl.errors.InputError):
        gl.behaviours(tiny, tiny_validation[:2], tiny_gains, progress=False, **bad)
    with pytest.raises(gl.errors.InputError, match="cuts everything"):
        gl.behaviours(tiny, tiny_validation[:2], tiny_gains, (1,), progress=False)


def test_the_loss_stands_beside_them(result, tiny, tiny_validation, tiny_gains):
    """The same figures as the surgery's, and a chance level that is far above the intact loss."""
    curve = gl.surgery(
        tiny, tiny_validation[:3], tiny_gains, (0.5,), orders=("quietest",), progress=False
    )
    (intact,) = result.find(behaviour="loss", order="intact")
    (cut,) = result.find(behaviour="loss", order="quietest")
    assert intact.value == pytest.approx(curve.baseline.mean(), abs=1e-4)
    assert cut.value == pytest.approx(curve.losses[0].mean(), abs=1e-4)
    assert intact.chance > intact.value + 1
    axes = result.plot()
    assert [ax.get_ylabel() for ax in axes][-1] == "nats per token"


def test_the_rise_by_position_is_that_of_the_same_cut(result, tiny, tiny_validation, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    wanted = gl.analysis.rise_by_position(tiny, tiny_validation[:3], mask, progress=False)
    rows = [r for r in result.by_position.table() if r["cut"] == "quietest, 50%"]
    for row, one in zip(rows, wanted.table(), strict=True):
        assert (row["first"], row["last"]) == (one["first"], one["last"])
        assert row["rise"] == pytest.approx(one["rise"], abs=1e-4)
    assert result.to_json()["by_position"]["kind"] == "rise by position"


def test_gains_and_text_are_checked(tiny, tiny_calibration, tiny_validation, tiny_gains):
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.behaviours(tiny, tiny_calibration[:2], tiny_gains, progress=False)
    other = replace(tiny_gains, model=replace(tiny_gains.model, fingerprint="0" * 64))
    with pytest.raises(gl.errors.InputError, match="other weights"):
        gl.behaviours(tiny, tiny_validation[:2], other, progress=False)
