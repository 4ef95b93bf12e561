"""Surgery against plain run_with_hooks, and its bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from oracle_surgery import plain_surgery

import gainlens as gl


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
    with pytest.raises(gl.FileFormatError):
        gl.SurgeryCurve.load(path)
    path.write_text(json.dumps({"format": "x"}))
    with pytest.raises(gl.FileFormatError):
        gl.SurgeryCurve.load(path)


def test_verdict_compares_the_interval_with_the_margin(curve):
    low, high = curve.verdict(0.5, 1.0).interval
    assert curve.verdict(0.5, max(high, 0) + 1e-3).status == "holds"
    if low > 0:
        assert curve.verdict(0.5, low / 2).status == "fails"
    for margin in (0, -1, float("nan")):
        with pytest.raises(gl.InputError, match="margin"):
            curve.verdict(0.5, margin)
    with pytest.raises(gl.InputError, match="fraction"):
        curve.verdict(0.3, 0.02)


def test_text_that_chose_does_not_judge(tiny, tiny_calibration, tiny_gains):
    with pytest.raises(gl.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_calibration, tiny_gains, progress=False)


def test_gains_of_other_weights_are_refused(tiny_gains, tiny_validation):
    other = gl.load_model("tiny")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "k_proj" in n or ".k." in n).mul_(1.5)
    with pytest.raises(gl.InputError, match="other weights"):
        gl.surgery(other, tiny_validation, tiny_gains, progress=False)


@pytest.mark.parametrize("fractions", [(), (1.5,), (-0.1,), (1,), (float("nan"),)])
def test_bad_fractions(unchecked, tiny, tiny_validation, tiny_gains, fractions):
    with pytest.raises(gl.InputError, match="fraction"):
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
