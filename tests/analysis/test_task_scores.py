"""Scores against the plain model's log-softmax."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis import score_tasks
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.analysis.task_running import above_chance
from gainlens.analysis.tasks import TASKS

SHORT = ("needle", "capitals", "elements")
"""Tasks that fit into the small model's context of 128 tokens."""


def half(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return gl.KeyMask(torch.rand(shape, generator=generator) < 0.5)


def plain(model, example, cut=None):
    """Log-probability per answer token, exactness and choice, by the model's own logits."""
    hooks = [] if cut is None else gl.ablation_hooks(model, cut)
    with torch.inference_mode():
        logits = model.run_with_hooks(example.tokens[None], fwd_hooks=hooks, return_type="logits")
    first = len(example.prompt)
    logs, exact = [], []
    for i, token in enumerate(example.answer.tolist()):
        found = logits[0, first + i - 1].double().log_softmax(-1)
        logs.append(float(found[token]))
        exact.append(int(found.argmax()) == token)
        if i == example.at:
            right, *wrong = found[example.choices].tolist()
            chosen = right > max(wrong)
    return np.mean(logs), all(exact), chosen


@pytest.mark.parametrize("fast", [True, False])
def test_scores_are_those_of_the_plain_model(any_tiny, tiny_gains, fast):
    cut = half(tiny_gains.shape)
    scores = score_tasks(
        any_tiny,
        {"half": cut},
        tasks=SHORT,
        lengths=(96, 128),
        n=5,
        evaluator=Evaluator(any_tiny, fast=fast),
        progress=False,
    )
    assert len(scores.rows) == 3 * 2 * 2
    for row in scores.rows:
        examples = TASKS[row.task].make(any_tiny.tokenizer, row.length, 5, 0)
        intact = [plain(any_tiny, example) for example in examples]
        found = intact if row.label == "intact" else [plain(any_tiny, e, cut) for e in examples]
        mean, exact, choice = (float(np.mean([f[i] for f in found])) for i in range(3))
        difference = np.mean([f[0] - i[0] for f, i in zip(found, intact, strict=True)])
        assert row.log_probability == pytest.approx(mean, abs=2e-4)
        assert row.difference == pytest.approx(difference, abs=2e-4)
        assert (row.exact_match, row.choice) == (exact, choice)
        assert row.n == len(examples)
        assert row.chance == 1 / 8
        assert row.interval[0] <= row.difference <= row.interval[1]
    cut_rows = scores.find(label="half")
    assert any(abs(row.difference) > 0.05 for row in cut_rows)


def test_a_cut_of_nothing_changes_nothing(tiny, tiny_gains):
    nothing = gl.KeyMask(torch.ones(tiny_gains.shape, dtype=torch.bool))
    scores = score_tasks(
        tiny, {"nothing": nothing}, tasks=SHORT, lengths=(100,), n=6, progress=False
    )
    for row in scores.rows:
        assert row.difference == 0.0
        assert row.interval == (0.0, 0.0)


class Knowing(Evaluator):
    """Knows every next token, less surely with a cut."""

    def last_logits(self, batch, n, cut=None):
        text = batch.roll(-1, 1)[:, -n:]
        return (20.0 if cut is None else 10.0) * torch.nn.functional.one_hot(text, self.vocabulary)


def test_what_the_intact_model_knows_shows(tiny, tiny_gains):
    cuts = {"half": half(tiny_gains.shape)}
    scores = score_tasks(
        tiny, cuts, tasks=SHORT, lengths=(128,), n=8, evaluator=Knowing(tiny), progress=False
    )
    assert all(row.shows and row.exact_match == row.choice == 1 for row in scores.rows)
    # log of e^a / (e^a + 1023) with a = 10 against a = 20
    expected = -np.log1p(1023 * np.exp(-10.0)) + np.log1p(1023 * np.exp(-20.0))
    for row in scores.find(label="half"):
        assert row.difference == pytest.approx(expected, abs=1e-6)
    groups = {(g.group, g.label): g for g in scores.groups}
    assert groups["contextual", "half"].tasks == ("needle",)
    assert groups["parametric", "half"].tasks == ("capitals", "elements")
    for group in groups.values():
        assert group.n == 8 * len(group.tasks)
        assert group.difference == pytest.approx(expected if group.label == "half" else 0, abs=1e-6)
    assert "needle at 128 tokens, half: 100% exact, -0.045" in scores.summary()


def test_a_random_model_is_at_chance_and_shows_nothing(tiny_gains):
    model = gl.load_model("tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.original_model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    scores = score_tasks(
        model, {"half": half(tiny_gains.shape)}, tasks=SHORT, lengths=(128,), n=16, progress=False
    )
    assert not any(row.shows for row in scores.rows)
    assert scores.groups == ()
    assert scores.summary().count("shows nothing: the intact model is at chance") == 3
    assert "0 of 3 tasks show something" in repr(scores)


@pytest.mark.parametrize(
    "hits, n, chance, above",
    # Binomial tails by hand: 4·(1/8)³·(7/8) + (1/8)⁴ = 0.0071, 2 of 4: 0.0789, (1/4)⁴ = 0.0039.
    [(3, 4, 1 / 8, True), (2, 4, 1 / 8, False), (4, 4, 1 / 4, True), (3, 4, 1 / 4, False)],
)
def test_above_chance(hits, n, chance, above):
    assert above_chance(hits, n, chance) is above


def test_the_head_sees_only_the_answer(tiny, monkeypatch):
    evaluator = Evaluator(tiny)
    assert evaluator.fast_copy is not None
    seen, head = [], evaluator.fast_copy.logits
    monkeypatch.setattr(
        evaluator.fast_copy,
        "logits",
        lambda hidden: (seen.append(hidden.shape[1]), head(hidden))[1],
    )
    score_tasks(
        tiny, {}, tasks=("needle",), lengths=(128,), n=2, evaluator=evaluator, progress=False
    )
    (example, _) = TASKS["needle"].make(tiny.tokenizer, 128, 2, 0)
    assert seen == [len(example.answer) + 1]


@pytest.mark.parametrize("fast", [True, False])
def test_last_logits_are_the_last_of_all(any_tiny, tiny_gains, fast):
    evaluator = Evaluator(any_tiny, fast=fast)
    batch = torch.randint(4, 1024, (3, 20), generator=torch.Generator().manual_seed(0))
    cut = half(tiny_gains.shape)
    with torch.inference_mode():
        hooks = gl.ablation_hooks(any_tiny, cut)
        wanted = any_tiny.run_with_hooks(batch, fwd_hooks=hooks, return_type="logits")
    found = evaluator.last_logits(batch, 5, cut)
    torch.testing.assert_close(found, wanted[:, -5:].float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(evaluator.logits(batch, cut)[:, -5:], found)


def test_plain_values(tiny):
    scores = score_tasks(tiny, {}, tasks=("capitals",), lengths=(60,), n=3, progress=False)
    stored = json.loads(json.dumps(scores.to_json()))
    assert stored["kind"] == "task_scores"
    assert stored["rows"][0]["task"] == "capitals"
    assert list(scores.to_dataframe()["low"]) == [0.0]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"lengths": (64, 129)}, "at most the model's context of 128 tokens"),
        ({"lengths": ()}, "lengths=()"),
        ({"lengths": (64, 64)}, "different numbers of tokens"),
        ({"tasks": ("needles",)}, "expected different ones of needle, needle_keys"),
        ({"tasks": "needle"}, "expected different ones of"),
        ({"tasks": ("needle", "needle")}, "expected different ones of"),
        ({"tasks": ("common_words",)}, "length=100 is too short for the task 'common_words'"),
        ({"n": 1}, "n=1: expected 2 prompts or more"),
        ({"cuts": {"intact": gl.KeyMask(torch.ones(4, 2, 32, dtype=torch.bool))}}, "another label"),
        ({"cuts": {"other": gl.KeyMask(torch.ones(3, 2, 32, dtype=torch.bool))}}, "(4, 2, 32)"),
    ],
)
def test_refused_in_one_line_before_any_pass(tiny, monkeypatch, changed, message):
    monkeypatch.setattr(Evaluator, "last_logits", lambda *args: pytest.fail("a pass was run"))
    given = {"cuts": {}, "tasks": ("needle",), "lengths": (100,), "progress": False, **changed}
    with pytest.raises(gl.GainlensError) as raised:
        score_tasks(tiny, given.pop("cuts"), **given)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_without_a_tokenizer():
    class Bare:
        """Has nothing."""

    with pytest.raises(gl.GainlensError, match="model has no tokenizer"):
        score_tasks(Bare(), {}, progress=False)


def test_one_length_alone_is_refused(tiny, unchecked):
    with pytest.raises(gl.GainlensError, match="lengths=64: expected different numbers of tokens"):
        score_tasks(tiny, {}, lengths=64, progress=False)
