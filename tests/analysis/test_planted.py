"""On models whose dead pairs are known the scores find exactly those, and verdicts are right."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from planted import DEAD, KINDS, PAIRS, planted

import gainlens as gl

SCORES = ("rms", "std", "qk", "logit_std", "fisher")
FINDS = {
    "shared": ("rms", "std", "qk", "logit_std", "fisher"),
    "per_head": ("rms", "std", "qk", "logit_std", "fisher"),
    "gauge": ("qk", "logit_std", "fisher"),
    "constant": ("logit_std", "fisher"),
}
FRACTION = DEAD / PAIRS
MARGIN = 0.02


@lru_cache(maxsize=None)
def gains_of(kind):
    model, _, calibration, _ = planted(kind)
    return gl.probe_gains(model, calibration, scores=SCORES, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_find_exactly_the_planted_units(kind):
    keep = planted(kind)[1]
    found = {
        score
        for score in SCORES
        for mask in [gl.KeyMask.quietest(gains_of(kind), FRACTION, score)]
        if torch.equal(mask.keep, keep)
    }
    assert set(FINDS[kind]) <= found
    # Looking at keys alone, or at energy instead of effect, must miss what was hidden from it.
    hidden_from = {"gauge": {"rms", "std"}, "constant": {"rms", "qk"}}.get(kind, set())
    assert not found & hidden_from


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts(kind):
    model, keep, _, validation = planted(kind)
    curve = gl.surgery(
        model,
        validation,
        gains_of(kind),
        fractions=(FRACTION, 0.75),
        score="fisher",
        seeds=(0,),
        cuts={"planted": gl.KeyMask(keep)},
        progress=False,
    )
    for order in ("quietest", "given"):  # so few documents can't hold: see stats.verdicts
        assert curve.verdict(FRACTION, MARGIN, order=order).interval[1] < MARGIN
    assert curve.verdict(0.75, MARGIN).status == "fails"
    for order in ("random", "loudest"):
        assert curve.verdict(FRACTION, MARGIN, order=order).status == "fails"
    assert abs(curve.verdict(FRACTION, MARGIN).estimate) < 1e-3


@pytest.mark.parametrize("kind", ["gauge", "constant"])
def test_a_ranking_by_keys_alone_is_found_out(kind):
    model, _, _, validation = planted(kind)
    curve = gl.surgery(
        model,
        validation,
        gains_of(kind),
        fractions=(FRACTION,),
        score="rms",
        orders=("quietest",),
        progress=False,
    )
    assert curve.verdict(FRACTION, MARGIN).status == "fails"


def test_matched_and_split_controls():
    gains = gains_of("per_head")
    keep = planted("per_head")[1]
    quiet = gl.KeyMask.quietest(gains, FRACTION, "fisher")
    matched = gl.KeyMask.matched(gains, FRACTION, "fisher", seed=3)
    assert torch.equal(matched.keep.sum((0, 1)), quiet.keep.sum((0, 1)))
    assert torch.equal(matched.keep.sum(-1), quiet.keep.sum(-1))
    assert not torch.equal(matched.keep, quiet.keep)
    with pytest.raises(gl.errors.InputError, match="universal"):
        gl.KeyMask.matched(gains, FRACTION, scope="universal")
    split = gl.KeyMask.split(gains, FRACTION, "fisher")
    cut = ~split.keep
    assert cut.float().mean() == FRACTION
    assert not (cut & cut[..., gains.model.partner]).any()
    # Twice as many pairs are touched, the dead ones among them.
    touched = cut | cut[..., gains.model.partner]
    assert (touched[~keep]).all()
    most = ~gl.KeyMask.split(gains, 0.75, "fisher").keep
    assert ((most & most[..., gains.model.partner]).float().mean(-1) == 0.5).all()
