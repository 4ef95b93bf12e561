"""Rise by position is what hooks and plain cross-entropy give, cut into buckets by hand."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis import rise_by_position
from gainlens.data.texts import Texts
from gainlens.stats.intervals import bootstrap_interval


def plain_losses(model, document, mask=None):
    """Loss of each predicted token by plain hooks, no part of the code under test."""

    layers = range(0 if mask is None else model.cfg.n_layers)
    hooks = [
        (f"blocks.{n}.attn.hook_rot_k", lambda keys, hook, n=n: keys * mask.keep[n]) for n in layers
    ]
    with torch.inference_mode():
        logits = model.run_with_hooks(document[None], fwd_hooks=hooks, return_type="logits")
    logp = logits[0, :-1].double().log_softmax(-1)
    return -logp.gather(-1, document[1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def ragged(tiny_validation):
    return [tiny_validation[0], tiny_validation[1][:21], tiny_validation[2], tiny_validation[3][:9]]


def test_each_bucket_is_the_mean_of_its_tokens(any_tiny, tiny_gains, ragged):
    cuts = {
        "quiet": gl.KeyMask.quietest(tiny_gains, 0.5),
        "loud": gl.KeyMask.loudest(tiny_gains, 0.25),
    }
    found = rise_by_position(any_tiny, ragged, cuts, buckets=(0, 8, 20, 500), progress=False)
    assert found.buckets == ((0, 7), (8, 19), (20, 62))
    assert found.cuts == ("quiet", "loud")
    assert found.lengths == (64, 21, 64, 9)
    # The document of 9 tokens predicts 8, that of 21 predicts 20: neither reaches the next bucket.
    assert found.n_tokens == (32, 36, 86)
    for c, mask in enumerate(cuts.values()):
        for n, document in enumerate(ragged):
            rise = plain_losses(any_tiny, document, mask) - plain_losses(any_tiny, document)
            for b, (first, last) in enumerate(found.buckets):
                if first >= len(rise):
                    assert np.isnan(found.rise[c, b, n])
                else:
                    wanted = rise[first : last + 1].mean()
                    assert found.rise[c, b, n] == pytest.approx(wanted, abs=1e-4)
    rows = found.table()
    assert [(r["cut"], r["first"], r["n_documents"]) for r in rows] == [
        ("quiet", 0, 4), ("quiet", 8, 3), ("quiet", 20, 2),
        ("loud", 0, 4), ("loud", 8, 3), ("loud", 20, 2),
    ]  # fmt: skip
    assert rows[1]["rise"] == pytest.approx(found.rise[0, 1, :3].mean())
    assert rows[1]["interval"] == bootstrap_interval(found.rise[0, 1, :3], 0.95)
    assert found.context.positions == (0, 63)
    assert np.nanmax(np.abs(found.rise)) > 0.05


def test_windows_of_one_text_count_once(tiny, tiny_gains, tiny_validation):
    rows = tuple(tiny_validation[:6])
    groups = (0, 0, 1, 1, 2, 2)
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    found = rise_by_position(
        tiny, Texts(rows, ("sotu",) * 6, groups), mask, buckets=(0,), progress=False
    )
    (row,) = found.table()
    assert row["n_documents"] == 3
    # Three documents: Student's interval of the means of the pairs of windows.
    means = found.rise[0, 0].reshape(3, 2).mean(1)
    half = 4.302653 * means.std(ddof=1) / np.sqrt(3)
    assert row["interval"] == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-5)


def test_a_cut_that_takes_nothing_costs_nothing(tiny, tiny_gains, ragged):
    whole = gl.KeyMask(torch.ones(tiny_gains.shape, dtype=torch.bool))
    found = rise_by_position(tiny, ragged, whole, buckets=(0, 8), progress=False)
    assert np.nanmax(np.abs(found.rise)) < 1e-6
    assert found.cuts == ("cut",)
    assert found.fractions == (0.0,)


def test_json_and_figure(tiny, tiny_gains, tiny_validation):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    # One document has no interval; JSON has no word for infinity.
    found = rise_by_position(tiny, tiny_validation[:1], mask, progress=False)
    assert found.buckets == ((0, 62),)
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["rows"][0]["rise"] == found.table()[0]["rise"]
    assert read["rows"][0]["interval"] == [None, None]
    ax = found.plot()
    assert ax.get_ylabel() == "rise of the loss (nats per token)"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0–62"]
    plt.close("all")
    assert "Rise of the loss" in found._repr_html_()


def test_bad_input(unchecked, tiny, tiny_gains, tiny_validation, tiny_calibration):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    for buckets in ((), (1, 2), (0, 64, 64), (0, 2.5)):
        with pytest.raises(gl.errors.InputError, match=r"buckets=.*rise from 0"):
            rise_by_position(tiny, tiny_validation, mask, buckets=buckets, progress=False)
    with pytest.raises(gl.errors.InputError, match="cuts is empty"):
        rise_by_position(tiny, tiny_validation, {}, progress=False)
    with pytest.raises(gl.errors.InputError, match=r"cuts\['a'\]=int"):
        rise_by_position(tiny, tiny_validation, {"a": 3}, progress=False)
    with pytest.raises(gl.errors.InputError, match="cut has shape"):
        rise_by_position(tiny, tiny_validation, gl.KeyMask(mask.keep[:2]), progress=False)
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        rise_by_position(tiny, tiny_calibration, mask, progress=False)
    with gl.ablate(tiny, mask), pytest.raises(gl.errors.InputError, match="inside gainlens.ablate"):
        rise_by_position(tiny, tiny_validation, mask, progress=False)
