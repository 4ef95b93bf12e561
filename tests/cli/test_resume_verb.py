"""``gainlens surgery``, interrupted and called again, goes on and ends in the same bytes."""

from __future__ import annotations

import pytest

from gainlens.analysis.sweep import run as surgery
from gainlens.cli.main import main

SMALL = ["--model", "tiny", "--n-docs", "3", "--length", "32"]


@pytest.mark.one_env
def test_goes_on_after_an_interrupt(tmp_path, monkeypatch, capsys):
    gains = tmp_path / "gains.safetensors"
    assert main(["probe", *SMALL, "--out", str(gains)]) == 0
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    call = ["surgery", *SMALL, "--fractions", "0.5", "--seeds", "1", "--gains", str(gains), "--out"]
    assert main([*call, str(whole)]) == 0
    real, runs = surgery._run_point, []

    def interrupted(*args):
        runs.append(args)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(surgery, "_run_point", interrupted)
    capsys.readouterr()
    assert main([*call, str(broken)]) == 130
    assert f"the same command resumes from {broken}.part" in capsys.readouterr().err
    assert not broken.exists()
    assert main([*call, str(broken)]) == 0
    assert len(runs) == 3 + 1  # of three cuts only the one that was interrupted is redone
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.one_env
def test_refuses_to_go_on_with_another_sweep(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    out = tmp_path / "sweep.json"
    call = ["surgery", *SMALL, "--fractions", "0.5", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(surgery, "_run_point", interrupt)
        assert main([*call, "--seeds", "1"]) == 130
    capsys.readouterr()
    assert main([*call, "--seeds", "2"]) == 2
    assert "sweep.json.part" in capsys.readouterr().err
