"""Figures of the page: their data, their colours, and the line of Python that makes each."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gainlens as gl
from gainlens.plots.markup.scales import ColourScale
from gainlens.report.build import Plan, build_report
from gainlens.report.claims import Claim
from gainlens.report.heat_figures import MOST, HeatAxes, HeatView, heat_figure
from gainlens.report.next_step import next_step
from gainlens.report.page import csv_of
from gainlens.stats.verdicts import Verdict

pytestmark = pytest.mark.one_env
PLAN = Plan(
    "tiny", "sotu,stdlib", n_docs=4, length=48, seeds=(0,), fractions=(0.5,), damage_docs=2,
    damage_length=32, context=96, across_docs=0, task_prompts=0, evidence_docs=2,
)  # fmt: skip


class Figure:
    """A figure as written in the page."""

    def __init__(self, text):
        self.text = text
        self.name = re.search('id="figure-([^"]+)"', text)[1]
        link = 'class="data" download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]+)'
        href = re.search(link, text)
        assert href[1] == f"{self.name}.csv"
        self.head, *self.rows = csv.reader(io.StringIO(unquote(html.unescape(href[2]))))
        self.python = html.unescape(re.search("<code>(.*?)</code>", text, re.DOTALL)[1])
        assert "&" not in self.python
        self.said = [html.unescape(t) for t in re.findall("<title>(.*?)</title>", text)]

    def dicts(self):
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("figures") / "report"
    facts = build_report(tiny, PLAN, folder)
    text = (folder / "index.html").read_text(encoding="utf-8")
    found = map(Figure, re.findall("<figure .*?</figure>", text, re.DOTALL))
    return {figure.name: figure for figure in found}, facts, folder


NAMES = (
    "rise_by_position", "surgery_impact", "change_by_distance_mean", "change_by_distance",
    "damage_by_layer", "damage_by_head", "layer_correlation", "universal_units", "unit_presence",
    "price",
    "sharing_cost",
    "slots", "red_line", "key_gains",
)  # fmt: skip


def test_all_figures_are_there(made):
    assert set(made[0]) - {"sinks"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_line_of_python_makes_something(made, name, tiny, tiny_validation, monkeypatch):
    figures, _, folder = made
    monkeypatch.chdir(folder)
    *before, last = figures[name].python.split("\n")
    mask = gl.KeyMask.quietest(gl.KeyGains.load("gains.safetensors"), 0.5)
    names = {"gl": gl, "model": tiny, "validation": tiny_validation, "cuts": {"cut": mask}}
    names["json"] = json
    exec("\n".join(before), names)
    result = eval(last, names)
    assert result is not None
    plt.close("all")


def test_gains_are_those_of_the_probe(made):
    figures, _, folder = made
    gains = gl.KeyGains.load(folder / "gains.safetensors")
    rows = figures["key_gains"].dicts()
    choices = {(r["score"], r["stage"]) for r in rows}
    assert choices >= {(s, stage) for s in ("rms", "std") for stage in ("projected", "rotated")}
    layers, heads, dims = gains.shape
    assert len(rows) % (layers * (heads + 1)) == 0
    for row in rows:
        x = gains.score(row["score"], stage=row["stage"])[int(row["layer"])].double()
        relative = x / x.mean(-1, keepdim=True)
        shown = relative.mean(0) if row["key head"] == "all" else relative[int(row["key head"])]
        assert [float(row[str(d)]) for d in range(dims)] == pytest.approx(shown.tolist(), rel=1e-3)
    assert rows[0]["score"] == "qk" and rows[0]["stage"] == "rotated", "the score that cuts"


def test_values_are_those_of_the_facts(made):
    figures, facts, _ = made
    worst = np.array(facts["damage"]["by_head"])
    for row in figures["damage_by_head"].dicts():
        own = [float(row[str(h)]) for h in range(worst.shape[1])]
        assert own == pytest.approx(worst[int(row["layer"])].tolist(), rel=1e-3, abs=1e-9)
    for row in figures["rise_by_position"].dicts():
        (known,) = [
            r
            for r in facts["reach"]["by_position"][row["text"]]["rows"]
            if r["cut"] == row["cut"] and r["first"] == int(row["first position"])
        ]
        assert float(row["rise (nats per token)"]) == pytest.approx(known["rise"], rel=1e-3)
    change = np.array(facts["reach"]["by_distance"]["change"])
    cuts = list(dict.fromkeys(r["cut"] for r in facts["reach"]["by_distance"]["rows"]))
    for row in figures["change_by_distance"].dicts():
        own = change[cuts.index(row["cut"]), int(row["layer"])]
        own = own.mean(0) if row["query head"] == "all" else own[int(row["query head"])]
        values = [float(v) for v in list(row.values())[3:]]
        assert values == pytest.approx(own.tolist(), rel=1e-3)
    cosine = [r for r in figures["layer_correlation"].dicts() if r["measure"] == "cosine"]
    for row, known in zip(cosine, facts["map"]["cosine"], strict=False):
        assert [float(row[str(i)]) for i in range(4)] == pytest.approx(known, rel=1e-3)


def test_the_surgery_of_one_text_is_that_text_alone(made):
    figures, _, folder = made
    curve = gl.SurgeryCurve.load(folder / "surgery.json")
    (index,) = curve.find(order="quietest", fraction=0.5)
    rows = [r for r in figures["surgery_impact"].dicts() if r["cut"].startswith("quietest")]
    rises = curve.deltas(index)
    for text, own in (("all", rises), ("sotu", rises[0::2]), ("stdlib", rises[1::2])):
        (row,) = [r for r in rows if r["text"] == text and float(r["fraction"]) == 0.5]
        assert float(row["rise (nats per token)"]) == pytest.approx(own.mean(), rel=1e-3)
        assert float(row["low"]) < own.mean() < float(row["high"])


def test_marks_say_their_values_without_a_script(made):
    figures, facts, _ = made
    said = figures["damage_by_layer"].said
    assert len(said) == 4
    for layer, (words, rise) in enumerate(zip(said, facts["damage"]["by_layer"], strict=True)):
        assert words.startswith(f"one layer cut, {layer}: ")
        number = float(words.split(": ")[1].split()[0].replace("−", "-"))
        assert number == pytest.approx(rise, rel=5e-3)
        assert words.endswith("nats per token")


def test_colours_of_cells_are_those_of_their_values(made):
    figure = made[0]["damage_by_head"]
    values = np.array([[float(v) for v in row[1:]] for row in figure.rows])
    config = json.loads(html.unescape(re.search('data-heat="([^"]+)"', figure.text)[1]))
    scale = config["scales"][""]
    assert scale["low"] == -scale["high"], "zero has the colour of the ground"
    assert np.abs(values).max() <= scale["high"] <= 1.2 * np.abs(values).max()
    drawn = np.full(values.shape, -1)
    cells = re.search('<g class="cells".*?</g>', figure.text)[0]
    for step, path in re.findall('<path class="d([0-9]+)" d="([^"]+)"', cells):
        for x, y, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            assert (drawn[int(y), int(x) : int(x) + int(wide)] == -1).all()
            drawn[int(y), int(x) : int(x) + int(wide)] = int(step)
    share = (values - scale["low"]) / (scale["high"] - scale["low"])
    assert np.abs(drawn - 24 * share).max() <= 0.5 + 1e-6


def test_csv_quotes_and_leaves_out():
    text = csv_of(["a", "b"], [['say "x", y', float("nan")], [None, 1.23456], [7, 1e-9]])
    assert text == 'a,b\r\n"say ""x"", y",\r\n,1.235\r\n7,1e-09\r\n'


def test_a_large_model_leaves_out_heads_then_views():
    rng = np.random.default_rng(0)
    scale = ColourScale.around_one(8, "gain")
    views = [
        HeatView((name,), scale, rng.random((80, 128)), rng.random((80, heads, 128)))
        for name, heads in (("a", 3), ("b", 3), ("c", 3))
    ]
    axes = HeatAxes([str(i) for i in range(80)], [str(i) for i in range(128)])
    figure = heat_figure("big", views, axes, alt="", caption="", python="", choices=("score",))
    rows = list(csv.reader(io.StringIO(figure.csv)))[1:]
    assert {r[0] for r in rows} == {"a", "b", "c"}
    assert {r[0] for r in rows if r[2] != "all"} == {"a"}
    assert sum(len(r) - 3 for r in rows) <= MOST


def test_the_page_of_a_large_model_stays_below_three_megabytes():
    """All heat maps of a page together, for 80 layers of 8 key heads and 64 query heads."""
    rng = np.random.default_rng(0)
    scale = ColourScale.around_one(8, "gain")
    size = 0
    for n_views, columns, parts in (
        (6, 128, 8),  # gains: three scores at two stages
        (6, 64, 8),  # the same by pair
        (15, 80, 0),  # what two layers have in common
        (3, 12, 64),  # change of attention by distance, for three cuts
        (1, 64, 8),  # sinks
        (1, 64, 8),  # the red line
        (1, 8, 0),  # one key head cut
    ):
        views = [
            HeatView(
                (str(i),), scale, rng.lognormal(size=(80, columns)),
                rng.lognormal(size=(80, parts, columns)) if parts else None,
            )
            for i in range(n_views)
        ]  # fmt: skip
        axes = HeatAxes([str(i) for i in range(80)], [str(i) for i in range(columns)])
        figure = heat_figure("one", views, axes, alt="", caption="", python="", choices=("view",))
        size += len(figure.data_link) + len(figure.heat_json) + len(figure.views[0].markup)
    assert 1_000_000 < size < 2_800_000, "100 kB for the page itself, 100 kB for lines and bars"


@pytest.mark.parametrize(
    ("status", "n", "more", "verb", "docs"),
    [
        ("holds", 80, 0, "slim", None),
        ("holds, except for harms in fewer than one document in ten", 40, 32, "slim", None),
        ("fails", 6, 0, "train", None),
        ("undecided", 3, 3000, "report", 144),
        ("undecided", 80, 40, "report", 240),
        ("undecided", 80, 4000, "train", None),
        ("undecided", 80, None, "train", None),
    ],
)
def test_next_step(status, n, more, verb, docs):
    verdict = Verdict(
        status, "half can go", 0.01, (0.0, 0.03), 0.02, n, more_documents=more,
        domain=("a text", "b"),
    )  # fmt: skip
    step = next_step([Claim("half", verdict, "", "", "surgery")], None)
    assert (step.verb, step.n_docs) == (verb, docs)
    command = step.command("tiny", "a text,b")
    assert command.startswith(f"gainlens {verb} --model tiny --text 'a text,b'")
    assert ("--n-docs" in command) == (docs is not None)


def test_panels_of_one_figure_have_one_axis(made):
    """Where zero is, and what a step is worth, is the same for every text."""
    view = re.search('class="panels">(.*?)</div>', made[0]["rise_by_position"].text, re.DOTALL)[1]
    panels = view.split("<svg")[1:]
    assert len(panels) == 2
    axes = [
        re.findall(r'<path class="grid" d="M58 ([\d.]+)H430"/><text[^>]*>([^<]+)', p)
        for p in panels
    ]
    assert axes[0] == axes[1] != []
