"""Several texts and one universal set of slots, through the verbs, on the small real model."""

from __future__ import annotations

import json

import pytest
import torch
from calls import status_of

import gainlens as gl
from gainlens.cli.main import main
from gainlens.data.loading import load_texts
from gainlens.data.sources import documents
from gainlens.export import load_slim, plan_of
from gainlens.export.judging import document_losses
from gainlens.files import read_json
from gainlens.model.loading import load_hf

TEXTS = ["--model", "tiny", "--text", "sotu,stdlib"]
pytestmark = pytest.mark.one_env


def test_a_sweep_is_judged_on_each_text(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    words = ["--n-docs", "6", "--length", "48", "--fractions", "0.5", "--seeds", "1"]
    assert main(["surgery", *TEXTS, *words, "--out", str(out), "--json"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert verdict["domain"] == ["sotu", "stdlib"] and "decided by" in verdict["note"]
    curve = gl.SurgeryCurve.load(out)
    rise = curve.deltas(curve.find(order="quietest")[0])
    assert verdict["estimate"] == pytest.approx(max(rise[0::2].mean(), rise[1::2].mean()))


def test_several_fractions_on_one_text_are_corrected_and_shown_by_position(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    words = ["--n-docs", "4", "--length", "96", "--fractions", "0.25,0.5", "--seeds", "1"]
    assert main(["surgery", "--model", "tiny", *words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all("corrected for 2 claims" in verdict["note"] for verdict in found["verdicts"])
    rows = found["by_position"]["rows"]
    assert [(r["cut"], r["first"], r["last"]) for r in rows] == [
        ("25%", 0, 63), ("25%", 64, 94), ("50%", 0, 63), ("50%", 64, 94),
    ]  # fmt: skip
    curve = gl.SurgeryCurve.load(out)
    for fraction, own in ((0.25, rows[:2]), (0.5, rows[2:])):
        whole = (64 * own[0]["rise"] + 31 * own[1]["rise"]) / 95
        rise = curve.deltas(curve.index_of(fraction)).mean()
        assert whole == pytest.approx(rise, abs=1e-5)


def test_one_set_for_all_heads_is_a_set_of_slots(tmp_path, capsys):
    """The command line takes what ``best_cut`` gives for this scope, and judges what it writes."""
    out = tmp_path / "slim"
    words = ["--n-docs", "24", "--scope", "universal", "--judge", "4", "--out", str(out), "--json"]
    assert main(["slim", *TEXTS, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    thin = load_slim(out)
    plan = plan_of(thin.config)
    assert plan.shared and plan.frequencies is not None
    model = gl.load_model("tiny")
    texts = [
        load_texts("sotu,stdlib", model, n_docs=n, length="mixed", split=split)
        for n, split in ((24, "calibration"), (4, "validation"))
    ]
    with torch.no_grad():
        cut = gl.best_cut(model, texts[0], 0.5, "universal", progress=False)
    assert torch.equal(plan.frequencies, gl.SlicePlan.from_cut(cut).frequencies)
    rise = document_losses(thin, texts[1]) - document_losses(load_hf("tiny"), texts[1])
    by_text = [rise[0::2].mean(), rise[1::2].mean()]
    assert found["verdict"]["estimate"] == pytest.approx(max(by_text), abs=1e-5)
    assert found["verdict"]["domain"] == ["sotu", "stdlib"]
    assert found["verdict"]["context"]["positions"] == [0, 127]
    near, far = found["by_position"]["rows"]
    assert (64 * near["rise"] + 63 * far["rise"]) / 127 == pytest.approx(rise.mean(), abs=1e-5)


def test_slots_are_healed_and_made_slim(tmp_path, capsys):
    healed, out = tmp_path / "healed", tmp_path / "slim"
    names = []
    for name in ("sotu", "pydoc"):  # small texts: all of a text trains
        folder = tmp_path / name
        folder.mkdir()
        for number, text in zip(range(70), documents(name), strict=False):
            (folder / f"{number}.txt").write_text(text[:1500], encoding="utf-8")
        names.append(str(folder))
    words = ["--n-docs", "8", "--length", "48", "--monitor", "2", "--judge", "4"]
    steps = ["--scope", "universal", "--steps", "2", "--check-every", "1", "--out", str(healed)]
    assert main(["train", "--model", "tiny", "--text", ",".join(names), *words, *steps]) == 0
    facts = read_json(healed / "training.json")
    assert set(facts["untrained"]["validation"]) == {"cut and refitted"}
    assert facts["verdict"]["domain"] == names
    (row,) = facts["by_position"]["rows"]
    assert (row["first"], row["last"], row["n_documents"]) == (0, 46, 4)
    plan = gl.SlicePlan.load(healed / "plan.json")
    assert plan.frequencies is not None
    capsys.readouterr()
    again = ["--plan", str(healed / "plan.json"), "--judge", "0", "--out", str(out)]
    assert main(["slim", "--model", str(healed), *again]) == 0
    text = load_texts("sotu", gl.load_model("tiny"), n_docs=3, length=48, split="validation")
    loss = document_losses(load_slim(out), text).mean()
    assert loss < document_losses(load_hf("tiny"), text).mean() + 0.5
    # At full width the checkpoint turns its slots by the frequencies of the original.
    assert loss < document_losses(load_hf(str(healed)), text).mean()


def test_texts_are_named_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "gainlens.cli.verbs.common.load_model", lambda *a, **k: pytest.fail("loaded")
    )
    for words, said in (
        (["--text", "sotu,nowhere.txt"], "nowhere.txt"),
        (["--text", "sotu,sotu"], "different names"),
        (["--text", "sotu,pydoc", "--n-docs", "9000"], "--text sotu has"),
    ):
        assert status_of(["surgery", "--model", "tiny", *words, "--out", tmp_path / "x"]) == 2
        assert said in capsys.readouterr().err
    for verb in ("bench", "report"):
        assert status_of([verb, "--length", "mixed", "--out", tmp_path / "x"]) == 2
        assert "--length mixed" in capsys.readouterr().err
