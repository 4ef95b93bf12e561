"""Figures of the page at the size they have there: nothing runs out of the picture."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gainlens as gl
from gainlens.plots import coordinate_maps
from gainlens.plots.axes import title
from gainlens.plots.basics import plot_gains, plot_kept
from gainlens.report.figures import SIZE

pytestmark = pytest.mark.one_env


def outside(figure):
    """Words that do not lie within the figure, in pixels of the drawn picture."""
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    found = []
    for ax in figure.axes:
        words = [ax.title, ax.xaxis.label, ax.yaxis.label]
        for word in words:
            box = word.get_window_extent()
            inside = (
                box.x0 >= page.x0 - 1
                and box.x1 <= page.x1 + 1
                and box.y0 >= page.y0 - 1
                and box.y1 <= page.y1 + 1
            )
            if word.get_text() and not inside:
                found.append(word.get_text())
    return found


def test_words_outside_are_found():
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.subplots().set_ylabel("words " * 30)
    assert outside(figure)


@pytest.mark.parametrize(
    "name", ["cosine", "above_null", "units", "ranks", "gains", "kept", "title"]
)
def test_nothing_runs_out_of_the_picture(name, tiny_gains):
    cmap = gl.coordinate_map(tiny_gains, n_permutations=99)
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    draw = {
        "cosine": lambda ax: coordinate_maps.plot_cosine(cmap, ax),
        "above_null": lambda ax: coordinate_maps.plot_above_null(cmap, ax),
        "units": lambda ax: coordinate_maps.plot_units(cmap, ax),
        "ranks": lambda ax: coordinate_maps.plot_ranks(cmap, ax),
        "gains": lambda ax: plot_gains(tiny_gains, ax),
        "kept": lambda ax: plot_kept(mask.keep.numpy(), ax),
        "title": lambda ax: title(ax, "a title of many words, " * 4),
    }[name]
    figure = Figure(figsize=SIZE, layout="constrained")
    draw(figure.subplots())
    assert outside(figure) == []


def test_a_title_knows_how_many_panels_there_are():
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    title(panels[1], "a title of many words that has to break into lines")
    assert "\n" in panels[1].get_title()
    alone = Figure(figsize=(9, 3), layout="constrained").subplots()
    title(alone, "a title of many words that has to break into lines")
    assert "\n" not in alone.get_title()


@pytest.mark.parametrize(
    ("claim", "label"),
    [
        ("half can be cut at less than 0.02 nats", "rise of the loss (nats per token)"),
        ("all layers share one coordinate system (cosine above 0.99)", "cosine"),
        ("a sink unit is one at every depth " * 4, "value (as the claim says)"),
    ],
)
def test_a_verdict_says_what_its_number_is(claim, label):
    verdict = gl.Verdict("fails", claim, 0.5, (0.4, 0.6), 0.02, 8)
    figure = Figure(figsize=(7, 1.9), layout="constrained")
    ax = verdict.plot(figure.subplots())
    assert ax.get_xlabel() == f"{label} (8 documents)"
    assert outside(figure) == []
    assert ax.get_title().replace("\n", " ") == claim.strip()
