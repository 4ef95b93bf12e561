"""Results in a notebook: one line, one figure with words for it, a table, axes to draw on."""

from __future__ import annotations

import base64
import html as markup
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.analysis.sweep.points import Point

NAMES = (
    "gains",
    "curve",
    "map",
    "mask",
    "plan",
    "refit",
    "verdict",
    "no number",
    "patching",
    "behaviours",
)
STATIC = ("verdict", "no number")
"""A single number is read in the line below its picture."""


@pytest.fixture(scope="module")
def results(tiny_gains):
    points = [
        Point("qk", "head", "pair", "zero", order, f, seed)
        for order, seed in (("quietest", None), ("random", 0), ("random", 1), ("loudest", None))
        for f in (0.25, 0.5)
    ]
    losses = 3 + np.linspace(0.01, 2, 24).reshape(8, 3)
    curve = SurgeryCurve(points, losses, np.full(3, 3.0), tiny_gains.model, "text", 100)
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    _, heads, d_head = tiny_gains.shape
    maps = torch.eye(d_head)
    effect = np.arange(12.0).reshape(2, 2, 3)
    row = sys.modules["gainlens.analysis.behaviour_curves"].BehaviourRow
    rows = [
        row(kind, f, order, None, None, 0.9 - f, 0.01, 0.125)
        for kind in ("induction", "agreement")
        for f, order in ((0.0, "intact"), (0.5, "quietest"), (0.5, "random"))
    ]
    nan = float("nan")
    return {
        "gains": tiny_gains,
        "curve": curve,
        "map": gl.coordinate_map(tiny_gains, n_permutations=99),
        "mask": mask,
        "plan": gl.SlicePlan.from_mask(mask, values=0.5),
        "refit": gl.ablation.RefitCut(
            mask,
            maps * mask.keep.repeat_interleave(tiny_gains.model.n_heads // heads, 1)[..., None],
            maps * mask.keep[..., None],
        ),
        "verdict": curve.verdict(0.25, 0.02),
        "no number": gl.Verdict("undecided", "a <claim> & more", nan, (nan, nan), nan, 0),
        "patching": gl.analysis.PatchEffects(effect, 1.0, 0.0, (0, 1, 2), "pair", "exact"),
        "behaviours": gl.analysis.Behaviours(rows, {}),
    }


@pytest.fixture(autouse=True)
def _no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_html_has_the_line_and_a_figure_with_words(results, name):
    html = results[name]._repr_html_()
    if name in STATIC:
        (alt,) = re.findall(r'<img alt="([^"]+)"', html)
        (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    else:
        alt = re.search(r'aria-label="([^"]+)"', html)[1]
        assert "<img" not in html and html.count("<svg") >= 1
        assert len(re.findall("<title>[^<]+: −?[0-9]", html)) >= 4, "values when pointed at"
    assert len(alt) > 30
    assert len(html) < 600_000
    assert "<script" not in html and "http" not in html and "url(" not in html
    shown = repr(results[name])
    assert "\n" not in shown
    assert len(shown) < 320
    assert "<claim>" not in html
    assert shown.split("(")[0] in html
    assert not plt.get_fignums(), "showing an object leaves no figure open"


@pytest.mark.parametrize("name", NAMES)
def test_where_no_html_is_taken_there_is_a_picture(results, name):
    picture = results[name]._repr_png_()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200_000
    assert not plt.get_fignums(), "showing an object leaves no figure open"


def said(html):
    """What the marks of a figure say, as words to numbers."""
    found = (t.rpartition(": ") for t in re.findall("<title>([^<]+)</title>", html))
    return {
        markup.unescape(where): float(re.match("[−0-9.,e]+", value)[0].replace("−", "-"))
        for where, _, value in found
        if value[:1].isdigit() or value.startswith("−")
    }


def test_cells_and_points_say_their_values(results, tiny_gains):
    qk = tiny_gains.score("qk").double()
    cells = said(results["gains"]._repr_html_())
    assert len(cells) == qk.shape[0] * qk.shape[2]
    for layer, dim in ((0, 0), (2, 5), (3, 31)):
        wanted = np.mean([row[dim] / row.mean() for row in qk[layer].numpy()])
        assert cells[f"layer {layer}, key dimension {dim}"] == pytest.approx(wanted, rel=6e-3)

    keep = results["mask"].keep
    cells = said(results["mask"]._repr_html_())
    assert cells["layer 1, key dimension 7"] == pytest.approx(float(keep[1, :, 7].float().mean()))

    curve, points = results["curve"], said(results["curve"]._repr_html_())
    (one,) = curve.find(order="quietest", fraction=0.5)
    assert points["quietest pairs, qk, head, 50%"] == pytest.approx(
        curve.deltas(one).mean(), rel=6e-3
    )
    both = [curve.deltas(i).mean() for i in curve.find(order="random", fraction=0.25)]
    assert len(both) == 2
    assert points["random pairs (control), 25%"] == pytest.approx(np.mean(both), rel=6e-3)

    cells = said(results["map"]._repr_html_())
    assert cells["layer 1, pair 3"] == pytest.approx(
        results["map"].profiles[1, 3] / results["map"].profiles[1].mean(), rel=6e-3
    )
    effects = results["patching"].effect
    assert said(results["patching"]._repr_html_())["layer.key head 1.0, pair 2"] == effects[1, 0, 2]


def test_a_figure_too_large_for_a_notebook_is_a_picture():
    html = gl.KeyMask(torch.rand(120, 2, 128) > 0.5)._repr_html_()
    assert len(html) < 600_000
    assert "<svg" not in html and html.count("data:image/png;base64,") == 1


@pytest.mark.parametrize("name", NAMES)
def test_plot_draws_and_never_shows(results, name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plot called show"))
    axes = np.atleast_1d(np.asarray(results[name].plot(), dtype=object)).ravel()
    assert len(plt.get_fignums()) == 1
    assert all(ax.has_data() or name == "no number" for ax in axes)
    for ax in axes:
        assert ax.get_xlabel()
        assert ax.get_title()
        assert ax.get_ylabel() or name in ("verdict", "no number")
    for image in (i for ax in axes for i in ax.images):
        assert image.colorbar.ax.get_ylabel(), "a colour says nothing without its scale"
        if image.cmap.name == "RdBu_r":
            assert image.norm.vmin == -image.norm.vmax, "diverging colours are centred on zero"
        else:
            assert image.cmap.name in ("viridis", "viridis_r", "magma_r")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "behaviours"])
def test_plot_takes_axes(results, name):
    ax = plt.subplots()[1]
    assert results[name].plot(ax) is ax
    assert results[name].plot(ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_layers_have_whole_numbers(results):
    for name in ("gains", "map", "mask", "patching"):
        ax = results[name].plot(plt.subplots()[1])
        ax.figure.canvas.draw()
        low, high = sorted(ax.get_ylim())
        ticks = [t for t in ax.get_yticks() if low <= t <= high]
        assert ticks
        assert all(float(t).is_integer() for t in ticks), name


def test_a_map_wants_four_axes_or_one(results):
    axes = plt.subplots(2, 2)[1]
    assert list(results["map"].plot(axes)) == list(axes.ravel())
    with pytest.raises(gl.errors.InputError, match="holds 3 axes: expected four, or one"):
        results["map"].plot(plt.subplots(1, 3)[1])


def test_parts_of_a_map_that_are_not_there(results):
    with pytest.raises(gl.errors.InputError, match="no sharing_cost yet"):
        results["map"].plot(part="sharing_cost")
    with pytest.raises(gl.errors.InputError, match="part='prize' is not one of"):
        results["map"].plot(part="prize")


def test_plot_of_a_gain_that_was_not_gathered(results):
    with pytest.raises(gl.errors.InputError, match="fisher"):
        results["gains"].plot(score="fisher")
    assert results["gains"].scores == ("rms", "std", "qk")


def test_tables(results):
    pytest.importorskip("pandas")
    gains, frame = results["gains"], results["gains"].to_dataframe()
    assert len(frame) == gains.score("qk").numel()
    row = frame[(frame.layer == 2) & (frame.kv_head == 1) & (frame.dim == 5)].iloc[0]
    assert row.qk == pytest.approx(float(gains.score("qk")[2, 1, 5]))
    assert row.rms == pytest.approx(float(gains.score("rms")[2, 1, 5]))
    assert row.partner == int(gains.model.partner[5])

    frame = results["curve"].to_dataframe()
    assert len(frame) == 8
    assert frame.delta.tolist() == [r["delta"] for r in results["curve"].table()]
    assert (frame.low < frame.delta).all()
    assert (frame.high > frame.delta).all()

    mask = results["mask"]
    frame = mask.to_dataframe()
    assert frame.kept.tolist() == mask.keep.sum(-1).flatten().tolist()
    assert frame.dims[3] == mask.keep[1, 1].nonzero().flatten().tolist()
    assert results["refit"].to_dataframe().equals(frame)
    assert set(results["plan"].to_dataframe().value_width) == {16}

    frame = results["verdict"].to_dataframe()
    assert frame.status.tolist() == ["undecided"]
    assert (frame.low[0], frame.high[0]) == results["verdict"].interval

    frame = results["patching"].to_dataframe()
    assert frame.effect.tolist() == list(range(12))
    assert frame.iloc[-1].tolist() == [1, 1, 2, 11]
    assert len(results["behaviours"].to_dataframe()) == 6


def test_tables_of_a_map(results):
    pytest.importorskip("pandas")
    cmap = results["map"]
    pairs = cmap.to_dataframe()
    assert len(pairs) == 6
    last = pairs.iloc[-1]
    assert (last.layer, last.layer2) == (2, 3)
    assert last.cosine == pytest.approx(cmap.cosine[2, 3])
    assert last.p == pytest.approx(cmap.p_values[2, 3])
    assert pairs.cosine.mean() == pytest.approx(cmap.summary()["cosine"])
    units = cmap.to_dataframe("units")
    assert sorted(units.unit) == list(range(16))
    assert set(units.unit[units.universal]) == set(cmap.universal_units)
    assert cmap.to_dataframe("measures").to_dict("records") == cmap.table()
    with pytest.raises(gl.errors.InputError, match="rows='heads'"):
        cmap.to_dataframe("heads")


@pytest.mark.parametrize("name", NAMES)
def test_without_pandas_one_line_says_so(results, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(gl.GainlensError, match="needs pandas, which is not installed") as caught:
        results[name].to_dataframe()
    assert "\n" not in str(caught.value)
