"""Comparing reports: the recorded report beside edited copies, whose numbers the test knows."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from test_page import Page

from gainlens.errors import GainlensError, InputError
from gainlens.report.compare import compare_reports, differences, read_reports
from gainlens.report.compare_figures import interval_figure
from gainlens.report.compare_tables import (
    all_tables,
    claims_table,
    map_table,
    position_table,
    texts_table,
    worth_table,
)

pytestmark = pytest.mark.one_env
RECORD = Path(__file__).resolve().parents[2] / "docs/results/report_smollm2.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture
def other(record):
    """A report of another model, with another size of text, and less in it."""
    facts = copy.deepcopy(record)
    facts["plan"].update(model="someone/other<b>", n_docs=12)
    facts["model"]["fingerprint"] = "00ff"
    facts["best_cut"] = None
    facts["reach"]["across_texts"] = []
    facts["reach"]["by_position"] = {"pydoc": facts["reach"]["by_position"]["pydoc"]}
    first = facts["reach"]["by_position"]["pydoc"]["rows"][0]
    first.update(rise=0.7654, interval=[None, None], last=47)
    facts["map"]["sinks"] = None
    verdict = facts["claims"][0]["verdict"]
    facts["claims"][0]["status"] = "undecided"
    verdict.update(estimate=0.0123, interval=[-0.5, 0.25], n_documents=4)
    facts["claims"][3]["verdict"].update(estimate=None, interval=[None, None], margin=None)
    return facts


def put(folder, facts):
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


@pytest.fixture
def made(tmp_path, other):
    put(tmp_path / "b", other)
    facts = compare_reports([RECORD, tmp_path / "b"], tmp_path / "out")
    return (tmp_path / "out/index.html").read_text(encoding="utf-8"), facts


def column(table, label):
    at = table.head.index(label)
    return {row[0]: row[at] for row in table.rows}


def test_every_claim_stands_beside_itself(record, other):
    named = [("a", record), ("b", other)]
    quote = record["claims"][0]["quote"]
    table = claims_table(quote, named)
    a, b = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert (a["verdict"], b["verdict"]) == (record["claims"][0]["status"], "undecided")
    assert (b["estimate"], b["interval"]) == ("+0.012", "-0.500 to +0.250")
    assert (b["bound"], b["documents"]) == ("0.02", "4")
    assert a["judged on"] == record["claims"][0]["where"] != ""
    assert a["text by text"].startswith("sotu: ")
    best = claims_table(record["best_cut"]["quote"], named)
    assert set(best.rows[1][1:]) == {"–"}
    sinks = claims_table(record["claims"][3]["quote"], named)
    assert sinks.rows[1][2:5] == ["–", "–", "–"]


def test_tables_match_rows_by_what_they_are(record, other):
    named = [("a", record), ("b", other)]
    positions = position_table(named)
    rows = record["reach"]["by_position"]
    assert len(positions.rows) == sum(len(text["rows"]) for text in rows.values())
    first = rows["pydoc"]["rows"][0]
    name = f"pydoc, {first['cut']}, from 0"
    assert column(positions, "b")[name] == "+0.765 to 47"
    assert column(positions, "a")[name].startswith(f"{first['rise']:+.3f} (")
    assert column(positions, "a")[name].endswith(" to 63")
    assert column(positions, "b")[f"sotu, {first['cut']}, from 0"] == "–"
    across = column(texts_table(named), "a")
    for row in record["reach"]["across_texts"]:
        cell = across[f"{row['chosen_on']} → {row['judged_on']}"]
        assert cell.startswith(f"{row['rise']:+.3f} ({row['interval'][0]:+.3f} to ")
    mapped = map_table(named)
    assert column(mapped, "b")["layers with a sink head"] == "–"
    assert column(mapped, "a")["mean cosine between layers"] == (
        f"{record['map']['summary']['cosine']:.3f}"
    )
    worth = column(worth_table(named), "a")
    model = record["model"]
    both = 4 * model["n_layers"] * model["n_kv_heads"] * model["d_head"]
    assert worth["cache, float16 (bytes per token)"] == f"{both:,}"
    assert worth["with half of the key dimensions"] == f"{both * 3 // 4:,} (× 0.75)"
    assert worth["with half of the values too"] == f"{both // 2:,} (× 0.5)"
    estimate = record["best_cut"]["verdict"]["estimate"]
    (cost,) = (value for name, value in worth.items() if name.startswith("cost of half"))
    assert cost.startswith(f"{estimate:+.3f}, worst of ")
    random = [r for r in record["surgery"] if r["order"] == "random" and r["fraction"] == 0.5]
    cuts = next(t for t in all_tables(named) if t.caption.startswith("Every cut"))
    mean = sum(r["delta"] for r in random) / len(random)
    assert column(cuts, "a")["50% cut, random"] == f"{mean:+.3f} ({len(random)} seeds)"


def test_what_differs_is_said_and_not_refused(record, other, tmp_path):
    other["versions"]["gainlens"] = "0.0.1"
    folders = [put(tmp_path / "a", record), put(tmp_path / "b", other)]
    said = differences(read_reports(folders))
    assert any(s == "Documents from each split: smollm2 18; other<b> 12." for s in said)
    assert any("gainlens" in s and "0.0.1" in s for s in said)
    assert any("tokenizer" in s for s in said)
    assert any("no verdict on: half can go without training" in s for s in said)
    same = read_reports([put(tmp_path / "a", record), put(tmp_path / "c", record)])
    assert [report.label for report in same] == ["smollm2 (a)", "smollm2 (c)"]
    assert differences(same) == ["smollm2 (a) and smollm2 (c) have the same weights."]


def test_a_report_of_a_version_with_less_is_compared_by_what_it_has(record, tmp_path):
    old = {key: record[key] for key in ("kind", "plan", "model", "claims")}
    old["surgery"] = [{"share": 0.5}]  # written otherwise
    facts = compare_reports([RECORD, put(tmp_path / "old", old)], tmp_path / "out")
    for table in facts["tables"]:
        at = table["head"].index("smollm2 (old)")
        assert all(row[0] and row[at] for row in table["rows"])
    assert len([c for c in facts["claims"] if c["report"] == "smollm2 (old)"]) == 4


def test_page_is_whole_and_fetches_nothing(made):
    text, facts = made
    page = Page(text)
    for tag, attrs in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "form", "img")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset"):
                assert value.startswith(("data:", "#"))
    assert "url(" not in text and "@import" not in text and "http" not in text
    figures = page.all("svg")
    assert len(figures) == 5
    assert all(f["role"] == "img" and len(f["aria-label"].split()) > 6 for f in figures)
    boxes = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table")) == 5 + len(facts["tables"])
    assert "other<b>" in page.text and "other&lt;b&gt;" in text
    for claim in facts["claims"]:
        assert claim["quote"] in page.text
    for table in facts["tables"]:
        assert all(cell in page.text for row in table["rows"] for cell in row)


def test_figure_is_drawn_to_scale(record, other):
    quote = record["claims"][0]["quote"]
    drawn = interval_figure(quote, [("a", record), ("b", other)])
    ticks = [(x, float(label)) for x, label in drawn.ticks]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]

    def value(x):
        return v0 + (x - x0) / (x1 - x0) * (v1 - v0)

    near = (v1 - v0) / 400  # a tenth of a unit of the drawing, twice
    assert [value(x) for x in drawn.rows[1][3:]] == pytest.approx([0.0123, -0.5, 0.25], abs=near)
    assert value(drawn.margin) == pytest.approx(0.02, abs=near)
    assert drawn.rows[1][:2] == ("b", "undecided")
    assert "b +0.012, interval -0.500 to +0.250, undecided" in drawn.alt
    only = interval_figure(record["claims"][3]["quote"], [("a", record), ("b", other)])
    assert [row[0] for row in only.rows] == ["a"]
    assert interval_figure("no such claim", [("a", record)]) is None


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("one", "at least two"),
        ("twice", "one report twice"),
        ("nothing", "does not exist"),
        ("other kind", "another kind"),
        ("older", "written by another version"),
        ("claims of another form", "written by another version"),
        ("broken", "can't be read as JSON"),
        ("out", "not a comparison"),
        ("out is a report", "not a comparison"),
        ("out is a file", "is a file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(record, tmp_path, case, wanted):
    a, out = put(tmp_path / "a", record), tmp_path / "out"
    sources = [RECORD, a]
    if case == "one":
        sources = [a]
    elif case == "twice":
        sources = [a, a / "report.json"]
    elif case == "nothing":
        sources = [a, tmp_path]
    elif case == "other kind":
        sources = [a, RECORD.parent / "probe.json"]
    elif case == "older":
        sources = [a, put(tmp_path / "b", {"kind": record["kind"]})]
    elif case == "claims of another form":
        sources = [a, put(tmp_path / "b", {**record, "claims": [{"quote": "x"}]})]
    elif case == "broken":
        (put(tmp_path / "b", {}) / "report.json").write_text("{")
        sources = [a, tmp_path / "b"]
    elif case == "out":
        out.mkdir()
        (out / "mine").write_text("x")
    elif case == "out is a report":
        out = put(tmp_path / "c", record)
    elif case == "out is a file":
        out.write_text("x")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(GainlensError, match=re.escape(wanted)) as error:
        compare_reports(sources, out)
    assert "\n" not in str(error.value)
    if case not in ("broken",):
        assert isinstance(error.value, InputError)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_an_earlier_comparison_is_replaced(record, tmp_path):
    a, out = put(tmp_path / "a", record), tmp_path / "out"
    compare_reports([RECORD, a], out)
    (out / "left over").write_text("x")
    compare_reports([a, RECORD], out)
    assert {p.name for p in out.iterdir()} == {"index.html", "comparison.json", "SHA256SUMS"}
    kept = json.loads((out / "comparison.json").read_text())
    assert kept["reports"][0]["label"] == "smollm2 (a)"
