"""``gainlens surgery`` finds bad input before it loads a model, and probes what its score needs."""

from __future__ import annotations

import json

import pytest
from calls import status_of as main

from gainlens.cli.verbs import surgery as command

SMALL = ["--model", "tiny", "--n-docs", "3", "--length", "32"]

BAD = {
    "margin": ["--margin", "0"],
    "margin ": ["--margin", "nan"],
    "seeds": ["--seeds", "0"],
    "scope": ["--scope", "house"],
    "unit": ["--unit", "triple"],
    "mode": ["--mode", "patch"],
    "scope ": ["--scope", "heads"],
    "n-docs": ["--n-docs", "2000"],
    "fraction  ": ["--fractions", "25,50"],
    "mode ": ["--mode", "louder"],
    "score": ["--score", "loudness"],
    "order": ["--orders", "quietest,upwards"],
    "fraction": ["--fractions", "1"],
    "fraction ": ["--fractions", "1.5"],
}


@pytest.mark.one_env
@pytest.mark.parametrize("what", BAD)
def test_bad_choices_cost_no_waiting(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_model", None)  # would be a TypeError
    assert main(["surgery", *SMALL, *BAD[what], "--out", str(tmp_path / "s.json")]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert what.strip() in error
    assert not list(tmp_path.iterdir())


@pytest.mark.one_env
@pytest.mark.parametrize("score", ["fisher", "logit_std"])
def test_costly_scores_are_probed_where_asked_for(score, tmp_path, capsys):
    out = tmp_path / "s.json"
    call = ["surgery", *SMALL, "--score", score, "--fractions", "0.5", "--seeds", "1", "--json"]
    assert main([*call, "--orders", "quietest, split", "--out", str(out)]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert [(row["order"], row["score"]) for row in table] == [
        ("quietest", score),
        ("split", score),
    ]
