"""The page as text: words for every figure, no request, phone, dark scheme, print, no script.

``test_browser.py`` opens it.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from html.parser import HTMLParser

import pytest

import gainlens as gl
from gainlens.report.build import Plan, build_report
from gainlens.report.sections_map import red_line_table, spans

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "rect"}


class Page(HTMLParser):
    """Every element with its attributes, and whether all are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:  # a shape with words for pointing at it
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "report"
    plan = Plan("tiny", "sotu", n_docs=3, length=48, seeds=(0,), damage_docs=2, damage_length=32)
    facts = build_report(gl.load_model("tiny"), plan, folder)
    return (folder / "index.html").read_text(encoding="utf-8"), facts


@pytest.fixture(scope="module")
def page(made):
    return Page(made[0])


def test_one_document_gives_a_page_without_intervals(tmp_path):
    """Student's interval of one document is infinite, which a file of JSON can't hold."""
    small = {"evidence_docs": 1, "damage_docs": 0, "long_docs": 0, "task_prompts": 0}
    plan = Plan(
        "tiny", "sotu", n_docs=1, length=48, fractions=(0.5,), seeds=(0,), refit_rounds=0, **small
    )
    facts = build_report(gl.load_model("tiny"), plan, tmp_path / "report")
    written = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert written == facts
    cuts = [row for row in written["surgery"] if row["order"] != "intact"]
    assert cuts
    assert all(row["interval"] == [None, None] for row in cuts)


def test_every_figure_has_words_and_a_size(page):
    assert not page.all("img"), "a picture is white in the dark and says no value"
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) >= 12
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"].split()) >= 6
        left, top, width, height = map(float, picture["viewbox"].split())
        assert (left, top, width) == (0, 0, 440)
        assert 150 < height < 500
    assert page.text.count("Rise of the loss when only one layer is cut by 50%.") == 1


def test_nothing_is_fetched(made, page):
    text, _ = made
    (policy,) = [m["content"] for m in page.all("meta") if "content-security" in str(m).lower()]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy and "*" not in policy
    assert page.all("script") == [{}], "one script, inline"
    script = re.search("<script>(.*?)</script>", text, re.DOTALL)[1]
    for word in ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon", "eval("):
        assert word not in script
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    for tag, attrs in page.elements:
        assert tag not in ("iframe", "object", "embed", "form")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "poster", "action"):
                assert value.startswith(("data:", "#")), (tag, name, value[:40])
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_phone_dark_and_print(made, page):
    text, _ = made
    metas = {m.get("name"): m.get("content") for m in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "dark" in metas["color-scheme"]
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert ':root[data-scheme="dark"]' in text
    assert "@media print" in text
    assert page.all("html")[0]["lang"] == "en"
    # A wide table scrolls in a box of its own that the keyboard reaches, not the page.
    boxes = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table"))
    assert all(d["tabindex"] == "0" and d["aria-label"] for d in boxes)


def contrast(a, b):
    """WCAG's contrast ratio of two colours."""

    def light(colour):
        full = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_can_be_read_on_their_ground(made, scheme):
    rules = re.findall(r":root(?:\S*) \{(.*?)\}", made[0], re.DOTALL)
    colours = dict(re.findall(r"--(\w+): ?#(\w+)", rules[scheme]))
    for name in ("ink", "quiet", "link", "holds", "fails", "undecided"):
        for ground in ("paper", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for series in (f"s{i}" for i in range(6)):
        assert contrast(colours[series], colours["paper"]) >= 3, series


def test_links_within_the_page_lead_somewhere(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"].startswith("data:text/csv") or link["href"].removeprefix("#") in ids


def test_first_paint_is_small_and_needs_no_script(made, page):
    text, _ = made
    assert len(text[: text.index("<figure")].encode()) < 100_000
    assert len(text.encode()) < 3_000_000
    plain = Page(re.sub("<script>.*?</script>", "", text, flags=re.DOTALL))
    for claim in made[1]["claims"]:
        assert claim["number"] in plain.text
    # Controls that need the script are hidden until it shows them.
    for _, attrs in plain.elements:
        if attrs.get("class") in ("choices", "copy", "tools"):
            assert "hidden" in attrs
    shown = [a for a in plain.all("div") if a.get("class") == "view" and "hidden" not in a]
    assert len(shown) == len(plain.all("figure")), "one drawing of each figure"


def test_the_next_step_is_on_the_first_screen(made, page):
    text, facts = made
    step = facts["next"]
    assert text.index(html.escape(step["why"])) < text.index('class="claim')
    assert facts["best_cut"]["status"] == "undecided"
    assert (step["verb"], step["n_docs"]) == ("report", 72)


def test_damage_is_on_the_page_and_in_the_facts(made, page):
    facts = json.loads(json.dumps(made[1]))["damage"]
    assert (len(facts["by_layer"]), len(facts["by_head"]), len(facts["by_head"][0])) == (4, 4, 2)
    assert (facts["n_documents"], facts["length"], facts["fraction"]) == (2, 32, 0.5)
    worst = max(value for row in facts["by_head"] for value in row)
    assert f"{worst:+.4f}" in page.text
    assert f"{max(facts['by_layer']):+.4f}" in made[0]


def test_red_line_table_is_what_the_facts_have(made, page):
    units = made[1]["map"]["red_line"]["units"]
    head, rows = red_line_table(units, 8, "pair")
    assert len(head) == 7
    assert len(rows) == len(units)
    for unit, row in zip(units, rows, strict=True):
        assert len(row) == len(head)
        assert row[0] == f"{unit['unit']} ({unit['dims'][0]}, {unit['dims'][1]})"
        assert row[3] == str(len(unit["used_by_heads"]))
        assert f"{unit['patched_rise']:+.4f}" in row[4]
        assert unit["tokens"][0]["text"].strip() in row[6]
        assert all(cell in page.text for cell in row)


@pytest.mark.one_env
def test_the_command_on_the_page_makes_the_same_plan():
    from gainlens.cli.main import build_parser

    plan = Plan("my model", "notes dir", n_docs=3, fractions=(0.3,), score="fisher", seeds=(4, 5),
                refit_rounds=0, seed=4, device="cuda")  # fmt: skip
    words = shlex.split(plan.command())
    assert words[0] == "gainlens"
    read = build_parser().parse_args(words[1:])
    again = Plan(read.model, read.text, n_docs=read.n_docs, length=read.length,
                 fractions=read.fractions, score=read.score, refit_rounds=read.refit_rounds,
                 seeds=tuple(range(read.seed, read.seed + read.seeds)), seed=read.seed,
                 device=read.device)  # fmt: skip
    assert again == plan


@pytest.mark.one_env
@pytest.mark.parametrize("more", [{"damage_docs": 0}, {"seeds": (0, 2)}, {"evidence_docs": 2}])
def test_what_no_flag_says_is_said_in_python(more):
    plan = Plan("tiny", "sotu", **more)
    words = plan.command()
    assert words.startswith("gainlens.report.build.build_report(model, Plan(model='tiny', text=")
    assert eval(words[words.index("Plan(") : words.index(", out)")]) == plan


def test_a_note_begins_like_a_sentence(made):
    facts = json.loads(json.dumps(made[1]))
    notes = [c["verdict"]["note"] for c in facts["claims"] if c["verdict"].get("note")]
    assert notes
    for note in notes:
        shown = html.escape(note[0].upper() + note[1:], quote=False)
        assert shown in html.escape(html.unescape(made[0]), quote=False)


@pytest.mark.one_env
def test_spans():
    assert spans([3, 0, 1, 2, 7, 9, 10]) == "0–3, 7, 9–10"
    assert spans([]) == ""
