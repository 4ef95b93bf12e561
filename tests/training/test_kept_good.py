"""What is kept is good: weights that break a loss replace neither checkpoint nor model."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from families import hugging_face
from test_going_on import SCRIPT, finished, folder, small, start, train

import gainlens as gl
from gainlens.training import TrainingError
from gainlens.training.settings import Settings

__all__ = ["folder"]
pytestmark = pytest.mark.one_env


def bad_update(monkeypatch, at, value):
    """The optimiser's step number ``at`` leaves ``value`` in every trained number."""
    real = Settings.make_optimizer
    steps = []

    def spoiled(self, groups):
        optimizer = real(self, groups)
        update = optimizer.step

        def step():
            update()
            steps.append(1)
            if len(steps) == at:
                for group in optimizer.param_groups:
                    for leaf in group["params"]:
                        leaf.data.fill_(value)

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(Settings, "make_optimizer", spoiled)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_a_bad_update_does_not_replace_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "checkpoint.safetensors"
    with monkeypatch.context() as patch:
        bad_update(patch, 3, value)
        with pytest.raises(TrainingError, match="step 3: the weights after it"):
            train(model, plan, tokens, checkpoint=file)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    whole = small()[0]
    train(whole, plan, tokens)
    train(model, plan, tokens, checkpoint=file)  # from step 2, which was good
    for got, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("monitored", [False, True])
def test_a_bad_last_update_is_not_written_into_the_model(monkeypatch, monitored):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    bad_update(monkeypatch, 4, float("inf"))
    more = dict(monitor=tokens[4:]) if monitored else {}
    with pytest.raises(TrainingError, match="step 4"):
        train(model, plan, tokens[:4], **more)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


KILLED_WHILE_WRITING = """
import os, signal
import safetensors.torch
real, count = safetensors.torch.save_file, []
def half(tensors, name, metadata=None):
    count.append(1)
    if len(count) == 2:
        real(tensors, name, metadata)
        os.truncate(name, os.path.getsize(name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, name, metadata)
safetensors.torch.save_file = half
"""


def test_killed_while_it_writes_a_checkpoint_it_gives_the_same_bytes(folder):
    finished(start(folder, 0, "wholly"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING + SCRIPT, str(folder), "0", "half"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL and not (folder / "half").exists()
    assert (folder / "half.safetensors").exists()
    finished(start(folder, 0, "half"))
    for name in ("model.safetensors", "plan.json"):
        assert (folder / "half" / name).read_bytes() == (folder / "wholly" / name).read_bytes()


def test_every_module_is_in_its_own_mode_again(monkeypatch):
    model, plan, tokens = small()
    model.train()
    model.model.layers[0].eval()  # some of a model may be kept from training
    wanted = [module.training for module in model.modules()]
    train(model, plan, tokens)
    assert [module.training for module in model.modules()] == wanted
    bad_update(monkeypatch, 1, float("nan"))
    with pytest.raises(TrainingError):
        train(model, plan, tokens)
    assert [module.training for module in model.modules()] == wanted
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(lr=float("nan")), "lr=nan"),
        (dict(lr=-1e-3), r"lr=-0\.001"),
        (dict(lr=None), "lr=None"),
        (dict(lr="fast"), "lr='fast'"),
        (dict(other_lr=0), "other_lr=0"),
        (dict(weight_decay=None), "weight_decay=None"),
        (dict(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (dict(betas=0.9), "betas=0.9"),
        (dict(seed=-1), "seed=-1"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(save_every=0), "save_every=0"),
        (dict(save_every=0.5), "save_every=0.5"),
        (dict(stop_margin=0.02), "stop_margin=0.02 without monitor"),
        (dict(tokens=torch.full((2, 8), 10**6)), "ids from 1000000 to 1000000"),
        (dict(tokens=[[1, 2, -3]]), "ids from -3 to 2"),
        (dict(tokens=torch.zeros(0, 8, dtype=torch.long)), "no document"),
        (dict(monitor=torch.zeros(2, 1, dtype=torch.long)), "at least 2"),
        (dict(checkpoint="/proc/nowhere/checkpoint.safetensors"), "can't be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_changes_nothing(change, said, unchecked):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    arguments = {"tokens": tokens, **change}
    with pytest.raises(gl.errors.InputError, match=said) as caught:
        train(model, plan, arguments.pop("tokens"), **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_text_beyond_learned_positions_is_told():
    model = hugging_face("GPT2LMHeadModel")
    plan = gl.SlicePlan(torch.ones(2, 4, 12, dtype=torch.bool))
    long = torch.zeros(2, 65, dtype=torch.long)
    with pytest.raises(
        gl.errors.InputError, match="tokens holds a document of 65 tokens.*at most 64"
    ):
        train(model, plan, long)
    with pytest.raises(gl.errors.InputError, match="monitor holds a document of 65 tokens"):
        train(model, plan, long[:, :64], monitor=long)
    run = train(model, plan, long[:, :64], steps=1)
    with pytest.raises(gl.errors.InputError, match="65 tokens"):
        run.judge(long)


def test_a_later_plan_that_fits_no_model_is_told_before_the_first_is_trained(tmp_path):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    keep = plan.keep.clone()
    keep[0, 0, 0] = False  # and its partner stays
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(gl.errors.InputError, match="rotary pairs"):
        train(model, [plan, gl.SlicePlan(keep)], tokens, checkpoint=file)
    other = gl.SlicePlan(plan.keep, fingerprint="0" * 64)
    with pytest.raises(gl.errors.InputError, match="made for another model"):
        train(model, [plan, other], tokens, checkpoint=file)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
