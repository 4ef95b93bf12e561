"""The verdict on a trained model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.data.loading import load_texts
from gainlens.model.loading import load_hf, load_tokenizer
from gainlens.stats.loss_rise import rise_verdict

pytestmark = pytest.mark.one_env


@pytest.mark.parametrize("scale", [0.01, 0.02, 0.04])
def test_undecided_always_says_how_many_more(scale):
    """Skewed differences: the plain t interval may be decided where the verdict's is not."""
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        rise = draw.exponential(scale, 12)
        verdict = rise_verdict(rise, 0.5, 0.02)
        seen.add(verdict.status)
        if verdict.status == "undecided":
            assert verdict.more_documents is None or verdict.more_documents >= 1
        else:
            assert verdict.more_documents == 0
    assert "undecided" in seen


def test_a_run_is_judged_by_text_and_position(tiny_gains):
    """Oracle: the slim model of the run and the intact original, position by position."""
    model, intact = load_hf("tiny"), load_hf("tiny")
    model.tokenizer = load_tokenizer("tiny")

    def texts(split, n, **more):
        return load_texts("sotu,stdlib", model.tokenizer, n_docs=n, split=split, **more)

    training = texts("training", 6, length=48)
    plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5))
    plan = replace(plan, fingerprint=None)
    run = gl.train_virtual_width(model, plan, training, steps=2, batch=2, progress=False)
    judges = texts("validation", 4, length=(96, 48))
    verdict, rise = run.judge_by_position(judges, 0.05, buckets=(0, 16), progress=False)
    thin = gl.slim(model, run.plan)
    own = []
    for row in judges:
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(
                    one(row[None], use_cache=False).logits[0, :-1], row[1:], reduction="none"
                )
                for one in (thin, intact)
            ]
        own.append((losses[0] - losses[1]).numpy())
    names = np.array(judges.domains)
    means = np.array([rise.mean() for rise in own])
    by_text = {name: means[names == name].mean() for name in judges.names}
    assert verdict.estimate == pytest.approx(max(by_text.values()), abs=1e-5)
    assert verdict.domain == ("sotu", "stdlib") and not verdict.covers(context=97)
    rows = rise.table()
    assert rows[0]["rise"] == pytest.approx(np.mean([r[:16].mean() for r in own]), abs=1e-5)
    assert rows[1]["rise"] == pytest.approx(np.mean([r[16:].mean() for r in own]), abs=1e-5)
    assert run.judge(judges, 0.05) == verdict
    grouped = run.judge(judges, 0.05, groups=(0, 1, 0, 1))
    assert grouped.n_documents == 1
    with pytest.raises(gl.errors.InputError, match="documents with the training"):
        run.judge_by_position(training, 0.05, progress=False)
