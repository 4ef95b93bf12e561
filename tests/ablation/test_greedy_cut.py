"""Cutting in rounds."""

from __future__ import annotations

import pytest
import torch
from planted import planted

import gainlens as gl


def test_one_round_is_the_one_shot_cut(tiny, tiny_calibration):
    gains = gl.probe_gains(tiny, tiny_calibration, ("fisher",), progress=False)
    one = gl.ablation.greedy_mask(tiny, tiny_calibration, 0.5, rounds=1, progress=False)
    assert torch.equal(one.keep, gl.KeyMask.quietest(gains, 0.5, "fisher", "layer").keep)


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_rounds_reach_the_fraction_in_whole_pairs(tiny, tiny_calibration, scope):
    mask = gl.ablation.greedy_mask(
        tiny, tiny_calibration[:2, :32], 0.5, scope=scope, rounds=3, progress=False
    )
    assert mask.fraction_kept == 0.5
    assert mask.whole_pairs(gl.model.key_sites(tiny).partner)
    if scope == "head":
        assert (mask.keep.float().mean(-1) == 0.5).all()
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_scores_are_taken_on_the_model_as_cut_so_far(monkeypatch, tiny, tiny_calibration):
    """Each round sees zeros in what went before, and never brings it back."""
    from gainlens.ablation import greedy_cut

    seen = []
    real = greedy_cut.probe_gains

    def spy(*args, **kwargs):
        gains = real(*args, **kwargs)
        seen.append((gains.score("qk", unit="pair") == 0).float().mean().item())
        return gains

    monkeypatch.setattr(greedy_cut, "probe_gains", spy)
    gl.ablation.greedy_mask(
        tiny, tiny_calibration[:2, :32], 0.75, score="qk", rounds=3, progress=False
    )
    assert seen == pytest.approx([0, 0.25, 0.5])


def test_it_finds_what_is_planted():
    model, keep, calibration, validation = planted("gauge")
    mask = gl.ablation.greedy_mask(model, calibration, 0.25, rounds=2, scope="head", progress=False)
    assert torch.equal(mask.keep, keep)
    gains = gl.probe_gains(model, calibration, progress=False)
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        other = gl.probe_gains(model, validation, progress=False)
        gl.surgery(model, calibration, other, (), cuts={"greedy": mask}, progress=False)
    assert gains.texts[0] in mask.facts["texts"]


@pytest.mark.parametrize("bad", [{"fraction": 0}, {"fraction": 1}, {"rounds": 0}, {"score": "x"}])
def test_bad_input(tiny, tiny_calibration, bad):
    arguments = {"fraction": 0.5, "rounds": 1, "progress": False} | bad
    with pytest.raises(gl.errors.InputError):
        gl.ablation.greedy_mask(tiny, tiny_calibration, **arguments)


def test_universal_rounds_rank_by_shares_of_what_is_left(tiny, tiny_calibration):
    """By hand: the second round's shares leave out what the first one cut."""
    tokens, partner = tiny_calibration[:2, :32], gl.model.key_sites(tiny).partner
    settings = {"score": "qk", "scope": "universal", "progress": False}
    first = gl.ablation.greedy_mask(tiny, tokens, 0.25, rounds=1, **settings)
    both = gl.ablation.greedy_mask(tiny, tokens, 0.5, rounds=2, **settings)
    assert both.fraction_kept == 0.5
    assert (both.keep == both.keep[:1, :1]).all()
    assert not (both.keep & ~first.keep).any()
    with gl.ablate(tiny, first):
        gains = gl.probe_gains(tiny, tokens, ("qk",), progress=False)
    values = gains.score("qk", unit="pair").double() * first.keep
    shares = (values / values.sum(-1, keepdim=True)).mean((0, 1))
    left = first.keep[0, 0].nonzero().flatten()
    left = left[left < partner[left]]
    more = left[shares[left].argsort()[: len(partner) // 8]]
    wanted = first.keep[0, 0].clone()
    wanted[more], wanted[partner[more]] = False, False
    assert torch.equal(both.keep[0, 0], wanted)


def test_a_fraction_that_leaves_nothing(tiny, tiny_calibration):
    with pytest.raises(gl.errors.InputError, match="cuts everything"):
        gl.ablation.greedy_mask(
            tiny, tiny_calibration[:2, :16], 0.98, score="qk", scope="head", progress=False
        )
