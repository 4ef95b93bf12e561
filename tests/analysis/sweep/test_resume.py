"""A sweep killed at any moment goes on where it was and ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis.sweep import run as sweep_run
from gainlens.analysis.sweep.resume_file import _line

SWEEP = """
import sys, torch
import gainlens as gl
import gainlens.analysis.sweep.run as s
torch.set_num_threads(1)
model = gl.load_model("tiny")
calibration = gl.load_tokens("sotu", model, n_docs=4, length=32, split="calibration")
validation = gl.load_tokens("sotu", model, n_docs=4, length=32, split="validation")
gains = gl.probe_gains(model, calibration, progress=False)
real = s._run_point
def counted(*args):
    print("run", flush=True)
    return real(*args)
s._run_point = counted
print("ready", flush=True)
gl.surgery(model, validation, gains, (0.25, 0.5), seeds=(0, 1, 2, 3), out=sys.argv[1],
           tokens_per_batch=32, progress=False)
"""


def start(path):
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.one_env
def test_kill_minus_nine(tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    process = start(whole)
    runs = process.communicate(timeout=300)[0].count("run")
    assert process.returncode == 0
    assert runs == 12
    process = start(broken)
    for line in process.stdout:  # kill while the fourth point runs
        runs -= line == "run\n"
        if runs == 12 - 4:
            break
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = broken.read_bytes()
    assert len(kept) < len(whole.read_bytes())
    finished = kept.count(b"\n") - 2  # header and intact model
    process = start(broken)
    again = process.communicate(timeout=300)[0].count("run")
    assert process.returncode == 0
    assert again == 12 - finished  # at most the one that was cut short is done twice
    assert finished >= 3
    assert broken.read_bytes() == whole.read_bytes()


@pytest.fixture
def sweep(tiny, tiny_validation, tiny_gains, tmp_path):
    path = tmp_path / "sweep.jsonl"

    def run(**changes):
        settings = {"fractions": (0.5,), "seeds": (0,), "out": path, "progress": False} | changes
        tokens = settings.pop("tokens", tiny_validation)
        model, gains = settings.pop("model", tiny), settings.pop("gains", tiny_gains)
        return gl.surgery(model, tokens, gains, **settings)

    run.path = path
    return run


def test_every_cut_recovers(sweep):
    """The file cut after any byte of its last two lines, as a kill or a full disk may leave it."""
    first = sweep()
    content = sweep.path.read_bytes()
    last_two = content[:-1].rfind(b"\n", 0, content[:-1].rfind(b"\n"))
    for end in [*range(last_two - 3, len(content), 61), 0, 5]:
        sweep.path.write_bytes(content[:end])
        again = sweep()
        assert sweep.path.read_bytes() == content
        assert again.losses.tolist() == first.losses.tolist()


def test_a_finished_sweep_runs_nothing(sweep, monkeypatch):
    first = sweep()
    monkeypatch.setattr(sweep_run, "_run_point", None)
    assert sweep().table() == first.table()


def test_another_sweep_is_refused(sweep, tiny_calibration, tiny_validation, tiny):
    sweep()
    before = sweep.path.read_bytes()
    with pytest.raises(gl.errors.InputError, match="another text"):
        sweep(tokens=tiny_validation[:3])
    with pytest.raises(gl.errors.InputError, match="another seeds"):
        sweep(seeds=(1,))
    with pytest.raises(gl.errors.InputError, match="another points"):
        sweep(fractions=(0.25,))
    with pytest.raises(gl.errors.InputError, match="another (gains|cuts)"):
        sweep(gains=gl.probe_gains(tiny, tiny_calibration[:3], progress=False))
    with pytest.raises(gl.errors.InputError, match="another stopping"):
        sweep(stop_margin=0.5)
    other = gl.load_model("tiny")
    other.blocks[0].attn.k.weight.data.mul_(1.5)
    gains = gl.probe_gains(other, tiny_calibration, progress=False)
    with pytest.raises(gl.errors.InputError, match="another model"):
        sweep(model=other, gains=gains)
    assert sweep.path.read_bytes() == before


def test_damage_elsewhere_is_an_error(sweep):
    sweep()
    lines = sweep.path.read_text().splitlines(keepends=True)
    damages = (
        (1, "not json\n"),
        (1, '{"index":7,"losses":[1]}\n'),
        (2, '{"index":1,"losses":["x"]}\n'),
        (0, "{}\n"),
        (0, '{"kind":"x"}\n'),
    )
    for number, bad in damages:
        sweep.path.write_text("".join([*lines[:number], bad, *lines[number + 1 :]]))
        with pytest.raises(gl.errors.FileFormatError):
            sweep()
    sweep.path.write_text("somebody's notes")
    with pytest.raises(gl.errors.FileFormatError):
        sweep()
    assert sweep.path.read_text() == "somebody's notes"


def test_each_line_is_plain_json(sweep):
    curve = sweep()
    rows = [json.loads(line) for line in sweep.path.read_text().splitlines()]
    assert rows[0]["kind"] == "surgery-sweep"
    assert len(rows) == 2 + len(curve.points)
    assert rows[2]["losses"] == curve.losses[0].tolist()


@pytest.mark.parametrize("part", ["mlp", "norm", "type"])
def test_any_other_weight_is_another_model(part, sweep, tiny_gains, tiny_validation):
    """Gains belong to all weights of a layer, a sweep file to their type as well."""
    sweep()
    other = gl.load_model("tiny")
    named = dict(other.named_parameters())
    if part == "type":
        other.to(torch.float64)
    else:
        names = [n for n in named if ("mlp" in n if part == "mlp" else named[n].ndim == 1)]
        named[names[0]].data.mul_(1.01)
    with pytest.raises(gl.errors.InputError, match="another model|other weights"):
        sweep(model=other)


def test_a_line_with_too_few_losses_is_damage(sweep):
    """Not a point that stopped early: this sweep stops none."""
    sweep()
    lines = sweep.path.read_text().splitlines(keepends=True)
    row = {k: v for k, v in json.loads(lines[2]).items() if k != "check"}
    for losses in (row["losses"][:4], row["losses"] * 2):
        short = _line({**row, "losses": losses})
        sweep.path.write_text("".join([*lines[:2], short, *lines[3:]]))
        with pytest.raises(gl.errors.FileFormatError, match="line 3"):
            sweep()
    extra = _line({**row, "index": len(lines) - 1})
    sweep.path.write_text("".join([*lines, extra]))
    with pytest.raises(gl.errors.FileFormatError, match="points"):
        sweep()


def test_a_point_that_stopped_early_is_read_back(sweep):
    settings = {"stop_margin": 1e-4, "level": 0.2, "tokens_per_batch": 64, "fractions": (0.9,)}
    first = sweep(**settings)
    assert np.isnan(first.losses).any()
    assert np.array_equal(sweep(**settings).losses, first.losses, equal_nan=True)


def test_other_means_are_another_cut(sweep, tiny_gains):
    """In mode mean the gains are part of what is put in, also where they rank alike."""
    sweep(mode="mean")
    sums = {n: v * 1.5 if n.startswith("k_sum") else v for n, v in tiny_gains.sums.items()}
    with pytest.raises(gl.errors.InputError, match="another cuts"):
        sweep(mode="mean", gains=replace(tiny_gains, sums=sums))
