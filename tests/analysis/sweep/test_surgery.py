"""Surgery against plain run_with_hooks, and its bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle_surgery import plain_surgery

import gainlens as gl
from gainlens.data.texts import Texts
from gainlens.stats.intervals import t_interval
from gainlens.stats.stopping import StoppingRule
from gainlens.stats.verdicts import Context, judge


@pytest.fixture(scope="module")
def curve(tiny, tiny_validation, tiny_gains):
    return gl.surgery(
        tiny, tiny_validation, tiny_gains, fractions=(0.25, 0.5), seeds=(0, 1), progress=False
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_surgery_agrees_with_plain_hooks(any_tiny, tiny_calibration, tiny_validation, fraction):
    gains = gl.probe_gains(any_tiny, tiny_calibration, progress=False)
    ours = gl.surgery(
        any_tiny,
        tiny_validation,
        gains,
        fractions=(fraction,),
        orders=("quietest",),
        progress=False,
    )
    intact, cut = plain_surgery(any_tiny, tiny_calibration, tiny_validation, fraction)
    row = ours.table()[0]
    assert row["loss"] == pytest.approx(cut, abs=1e-5)
    assert row["delta"] == pytest.approx(cut - intact, abs=1e-5)
    assert abs(row["delta"]) > 1e-3


def test_table_has_every_point(curve):
    rows = curve.table()
    keys = {"score", "scope", "unit", "mode", "order", "fraction", "seed", "loss", "delta"}
    assert all(keys | {"interval"} <= set(row) for row in rows)
    assert len(rows) == 2 + 2 * 2 + 2
    assert {row["order"] for row in rows} == {"quietest", "random", "loudest"}
    for row in rows:
        assert row["interval"][0] < row["delta"] < row["interval"][1]


def test_cutting_nothing_changes_nothing(tiny, tiny_validation, tiny_gains):
    curve = gl.surgery(
        tiny, tiny_validation, tiny_gains, fractions=(0.0,), orders=("quietest",), progress=False
    )
    assert curve.table()[0]["delta"] == 0


def test_save_and_load(curve, tmp_path):
    path = tmp_path / "surgery.json"
    curve.save(path)
    again = gl.SurgeryCurve.load(path)
    assert again.table() == curve.table()
    assert again.verdict(0.5, 0.02) == curve.verdict(0.5, 0.02)
    path.write_text(path.read_text()[:200])
    with pytest.raises(gl.errors.FileFormatError):
        gl.SurgeryCurve.load(path)
    path.write_text(json.dumps({"format": "x"}))
    with pytest.raises(gl.errors.FileFormatError):
        gl.SurgeryCurve.load(path)


def test_verdict_compares_the_interval_with_the_margin(curve):
    # Rises that are known: 0.01 to 0.02 nats on every document.
    rises = np.linspace(0.01, 0.02, len(curve.baseline))
    planted = replace(curve, losses=curve.baseline + np.tile(rises, (len(curve.points), 1)))
    few = planted.verdict(0.5, 0.03)  # six documents: nothing can hold
    assert few.status == "undecided"
    assert few.more_documents == 66
    assert planted.verdict(0.5, 0.005).status == "fails"
    many = replace(
        planted,
        losses=np.tile(planted.losses, 12),
        baseline=np.tile(planted.baseline, 12),
        lengths=planted.lengths * 12,
        n_tokens=planted.n_tokens * 12,
    )
    assert many.verdict(0.5, 0.03).status == "holds"
    assert many.verdict(0.5, 0.005).status == "fails"
    assert many.verdict(0.5, 0.015).status == "undecided"
    for margin in (0, -1, float("nan")):
        with pytest.raises(gl.errors.InputError, match="margin"):
            curve.verdict(0.5, margin)
    with pytest.raises(gl.errors.InputError, match="fraction"):
        curve.verdict(0.3, 0.02)


def test_a_verdict_says_where_it_was_judged(tiny, tiny_validation, tiny_gains, tmp_path):
    rows = (tiny_validation[0], tiny_validation[1][:20], tiny_validation[2][:30])
    text = Texts(rows, ("sotu", "code", "sotu"), (0, 1, 2))
    found = gl.surgery(
        tiny, text, tiny_gains, fractions=(0.5,), orders=("quietest",), progress=False
    )
    assert found.lengths == (64, 20, 30)
    assert found.domains == ("sotu", "code", "sotu")
    found.save(tmp_path / "curve.json")
    for curve in (found, gl.SurgeryCurve.load(tmp_path / "curve.json")):
        verdict = curve.verdict(0.5, 0.02)
        assert verdict.domain == ("sotu", "code")
        assert verdict.context == Context((0, 19), (0, 19)), "code was judged on 20 tokens"
        assert verdict.covers(context=20, domain="code")
        assert not verdict.covers(context=21)
        assert not verdict.covers(domain="pydoc")
        by_text = curve.verdicts(0, 0.02)
        assert by_text["sotu"].context == Context((0, 63), (0, 63))
        deltas = curve.deltas(0)
        assert by_text["sotu"].estimate == pytest.approx(deltas[[0, 2]].mean())
        assert by_text["code"].estimate == pytest.approx(deltas[1])
        assert verdict.estimate == max(v.estimate for v in by_text.values())
    # A plain tensor has lengths and no names.
    plain = gl.surgery(
        tiny, tiny_validation, tiny_gains, (0.5,), orders=("quietest",), progress=False
    )
    assert plain.verdict(0.5, 0.02).context == Context((0, 63), (0, 63))
    assert plain.verdict(0.5, 0.02).domain == ()


def test_windows_of_one_text_count_once(tiny, tiny_validation, tiny_gains, tmp_path):
    options = dict(fractions=(0.5,), orders=("quietest",), progress=False)
    text = Texts(tuple(tiny_validation[:6]), ("sotu",) * 6, (0, 0, 1, 1, 2, 2))
    loaded = gl.surgery(tiny, text, tiny_gains, **options)
    given = gl.surgery(tiny, tiny_validation[:6], tiny_gains, groups=(4, 4, 7, 7, 9, 9), **options)
    apart = gl.surgery(tiny, tiny_validation[:6], tiny_gains, **options)
    loaded.save(tmp_path / "curve.json")
    for curve in (loaded, given, gl.SurgeryCurve.load(tmp_path / "curve.json")):
        rise = curve.deltas(0)
        found = curve.verdict(0.5, 0.02)
        assert found.n_documents == 3
        assert found.interval == judge("", rise, 0.02, groups=[0, 0, 1, 1, 2, 2]).interval
        assert curve.interval(0) == t_interval(rise.reshape(3, 2).mean(1))
    assert apart.verdict(0.5, 0.02).n_documents == 6 and apart.groups == ()
    for groups in ((1, 2), (-1,) * 6):
        with pytest.raises(gl.errors.InputError, match="groups has"):
            gl.surgery(tiny, tiny_validation[:6], tiny_gains, groups=groups, **options)


def test_a_point_that_stopped_early_was_judged_on_what_it_ran(curve):
    """The last two of six documents are longer and of another text, and no point needs them."""
    losses = np.full((1, 6), np.nan)
    losses[0, :4] = curve.baseline[:4] + 1
    stopped = replace(
        curve,
        points=curve.points[:1],
        losses=losses,
        stopping=StoppingRule(0.02, (4, 6)),
        lengths=(64,) * 4 + (4096,) * 2,
        domains=("sotu",) * 4 + ("code",) * 2,
        n_tokens=4 * 64 + 2 * 4096,
    )
    verdict = stopped.verdict_at(0, 0.02)
    assert verdict.domain == ("sotu",)
    assert not verdict.covers(context=65)


def test_lengths_and_names_that_are_not_the_documents(curve):
    with pytest.raises(gl.errors.InputError, match="lengths has 1 entries"):
        replace(curve, lengths=(64,))
    with pytest.raises(gl.errors.InputError, match="domains has 1 entries"):
        replace(curve, domains=("sotu",))
    with pytest.raises(gl.errors.InputError, match="lengths add up to"):
        replace(curve, lengths=(2,) * 6)


def test_text_that_chose_does_not_judge(tiny, tiny_calibration, tiny_gains):
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_calibration, tiny_gains, progress=False)


def test_gains_of_other_weights_are_refused(tiny_gains, tiny_validation):
    other = gl.load_model("tiny")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "k_proj" in n or ".k." in n).mul_(1.5)
    with pytest.raises(gl.errors.InputError, match="other weights"):
        gl.surgery(other, tiny_validation, tiny_gains, progress=False)


@pytest.mark.parametrize("fractions", [(), (1.5,), (-0.1,), (1,), (float("nan"),)])
def test_bad_fractions(unchecked, tiny, tiny_validation, tiny_gains, fractions):
    with pytest.raises(gl.errors.InputError, match="fraction"):
        gl.surgery(tiny, tiny_validation, tiny_gains, fractions, progress=False)


def test_documents_of_unequal_length_weigh_the_same(tiny, tiny_validation, tiny_gains):
    ragged = [tiny_validation[0], tiny_validation[1, :20]]
    both = gl.surgery(
        tiny, ragged, tiny_gains, fractions=(0.5,), orders=("quietest",), progress=False
    )
    alone = [
        gl.surgery(
            tiny, [doc], tiny_gains, fractions=(0.5,), orders=("quietest",), progress=False
        ).losses[0, 0]
        for doc in ragged
    ]
    assert np.allclose(both.losses[0], alone, atol=1e-5)


def test_a_fraction_that_cuts_everything_once_rounded(tiny, tiny_validation, tiny_gains):
    """0.98 of 32 dimensions is 31.36: in whole pairs all of them, so attention would be uniform."""
    for call in (gl.surgery, gl.behaviours):
        with pytest.raises(gl.errors.InputError, match="cuts everything"):
            call(tiny, tiny_validation, tiny_gains, (0.98,), progress=False)
    empty = gl.KeyMask(torch.zeros(tiny_gains.shape, dtype=torch.bool))
    with pytest.raises(gl.errors.InputError, match="cuts everything"):
        gl.surgery(tiny, tiny_validation, tiny_gains, (), cuts={"all": empty}, progress=False)


def test_a_given_cut_is_found_by_its_fraction(tiny, tiny_validation, tiny_gains):
    keep = torch.ones(tiny_gains.shape, dtype=torch.bool).flatten()
    keep[: round(0.3 * 256) - 1] = False
    share = 1 - keep.sum().item() / keep.numel()
    cuts = {"by hand": gl.KeyMask(keep.view(tiny_gains.shape))}
    curve = gl.surgery(tiny, tiny_validation, tiny_gains, (), cuts=cuts, progress=False)
    assert curve.verdict(share, 0.02, order="given").n_documents == 6


@pytest.mark.parametrize("way", ["gains", "quietest", "greedy", "refit"])
def test_text_that_shares_documents_is_refused(
    way, tiny, tiny_calibration, tiny_validation, tiny_gains
):
    """Not the same text, but half of its documents: the hash of the whole would not show it."""
    mixed = torch.cat([tiny_calibration[:2], tiny_validation[3:]])
    settings = {"progress": False, "fractions": (0.5,), "orders": ("quietest",)}
    gains, cuts = tiny_gains, {}
    if way == "gains":
        gains = gl.probe_gains(tiny, mixed, progress=False)
    elif way == "quietest":  # the whole text is known of a mask, its documents are not
        mine = gl.probe_gains(tiny, tiny_validation, progress=False)
        cuts = {"x": gl.KeyMask.quietest(mine, 0.5)}
    elif way == "greedy":
        cuts = {
            "x": gl.ablation.greedy_mask(tiny, mixed, 0.5, score="qk", rounds=1, progress=False)
        }
    else:
        mask = gl.KeyMask.quietest(tiny_gains, 0.5)
        cuts = {"x": gl.ablation.refit(tiny, mixed, mask, rounds=1, iterations=1, progress=False)}
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_validation, gains, cuts=cuts, **settings)
    if way == "quietest":
        return
    rest = tiny_validation[:3]
    assert gl.surgery(tiny, rest, gains, cuts=cuts, **settings).n_documents == 3
    with pytest.warns(UserWarning, match="1 of 4 documents"):
        gl.surgery(tiny, tiny_validation[:4], gains, cuts=cuts, **settings)


def test_marks_of_documents_are_kept(tiny, tiny_calibration, tmp_path):
    parts = [gl.probe_gains(tiny, t, progress=False) for t in tiny_calibration.split(3)]
    whole = gl.probe_gains(tiny, tiny_calibration, progress=False)
    assert (parts[0] + parts[1]).documents == whole.documents
    assert len(set(whole.documents)) == 6
    whole.save(tmp_path / "g")
    assert gl.KeyGains.load(tmp_path / "g").documents == whole.documents
    # The first words of two speeches are often the same: short pieces say nothing.
    assert gl.probe_gains(tiny, tiny_calibration[:, :16], progress=False).documents == ()


@pytest.mark.parametrize("margin", [0, -1, float("nan"), float("inf")])
def test_margins_that_are_none(curve, margin):
    with pytest.raises(gl.errors.InputError, match="margin"):
        curve.verdict(0.5, margin)


def test_undecided_always_says_how_many_more(curve):
    (index,) = curve.find(order="loudest", fraction=0.5)
    low, high = curve.verdict_at(index, 1.0).interval
    mean = float(curve.deltas(index).mean())
    for margin in (mean + share * (end - mean) for share in (0.2, 0.9) for end in (low, high)):
        if margin > 0:
            verdict = curve.verdict_at(index, margin)
            assert verdict.status == "undecided"
            assert verdict.more_documents >= 1
            assert str(verdict.more_documents) in verdict.note


def test_arguments_of_another_kind(unchecked, tiny, tiny_validation, tiny_gains, curve):
    with pytest.raises(gl.errors.InputError, match="fractions=0.5"):
        gl.surgery(tiny, tiny_validation, tiny_gains, 0.5, progress=False)
    with pytest.raises(gl.errors.InputError, match=r"cuts\['x'\]=Tensor"):
        gl.surgery(tiny, tiny_validation, tiny_gains, cuts={"x": torch.ones(2)}, progress=False)
    for margin in (None, "0.02"):
        with pytest.raises(gl.errors.InputError, match="margin"):
            curve.verdict(0.5, margin)
