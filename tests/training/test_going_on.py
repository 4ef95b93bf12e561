"""A run that is killed goes on to the same bytes; one that fails leaves everything as it was."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import hugging_face

import gainlens as gl
from gainlens.model.loading import load_hf
from gainlens.training import TrainingError, train_virtual_width

SCRIPT = """
import sys, time
import torch
import gainlens as gl
from gainlens.model.loading import load_hf
from gainlens.training import train_virtual_width

folder, pause = sys.argv[1], float(sys.argv[2])
model = load_hf("tiny")
plan = gl.SlicePlan.load(folder + "/plan.json")
from gainlens.files import load_tensors
tensors, _ = load_tensors(folder + "/tokens.safetensors", "tokens")
Trainer = sys.modules["gainlens.training.virtual_width"].Trainer
step = Trainer.step
def slow(self, n):
    time.sleep(pause)
    return step(self, n)
Trainer.step = slow
run = train_virtual_width(
    model, plan, tensors["training"], monitor=tensors["monitor"], steps=8, batch=2, lr=3e-3,
    check_every=3, checkpoint=folder + "/" + sys.argv[3] + ".safetensors", save_every=2,
    progress=False, weight_decay=0.01,
)
run.save(folder + "/" + sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_gains):
    from gainlens.files import save_tensors

    path = tmp_path_factory.mktemp("training")
    model = gl.load_model("tiny")
    gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer")).save(
        path / "plan.json"
    )
    tokens = {
        "training": gl.load_tokens("sotu", model, n_docs=5, length=40, split="training"),
        "monitor": gl.load_tokens("sotu", model, n_docs=3, length=40, split="calibration"),
    }
    save_tensors(path / "tokens.safetensors", "tokens", tokens, {})
    return path


def start(folder, pause, name):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause), name],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


@pytest.mark.one_env
def test_killed_and_started_again_it_gives_the_same_bytes(folder):
    finished(start(folder, 0, "whole"))
    broken = start(folder, 0.5, "broken")
    checkpoint = folder / "broken.safetensors"
    limit = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.7)  # in the middle of the step after
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert checkpoint.exists() and not (folder / "broken").exists()
    finished(start(folder, 0, "broken"))
    for name in ("model.safetensors", "plan.json"):
        assert (folder / "broken" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    curves = [gl_json(folder / name / "training.json")["curve"] for name in ("whole", "broken")]
    assert curves[0] == curves[1] and len(curves[0]) == 9


def gl_json(path):
    from gainlens.files import read_json

    return read_json(path)


def small():
    """A random Llama of the shared matrix, a plan of it, and text."""
    model = hugging_face("LlamaForCausalLM")
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_key_value_heads, d_head)
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[..., : d_head // 4] = keep[..., d_head // 2 : d_head // 2 + d_head // 4] = True
    tokens = torch.randint(
        0, config.vocab_size, (6, 10), generator=torch.Generator().manual_seed(1)
    )
    return model, gl.SlicePlan(keep), tokens


def train(model, plan, tokens, **more):
    settings = dict(steps=4, batch=2, progress=False, save_every=1)
    return train_virtual_width(model, plan, tokens, **{**settings, **more})


@pytest.mark.one_env
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch
):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "checkpoint.safetensors"
    module = sys.modules["gainlens.training.virtual_width"]
    real = module.Trainer._backward
    count = []

    def spoiled(self, *arguments):
        count.append(1)
        return real(self, *arguments) + (float("nan") if len(count) == 3 else 0.0)

    monkeypatch.setattr(module.Trainer, "_backward", spoiled)
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        train(model, plan, tokens, checkpoint=file)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    monkeypatch.setattr(module.Trainer, "_backward", real)
    whole = small()[0]
    train(whole, plan, tokens)
    train(model, plan, tokens, checkpoint=file)  # from step 2, which was good
    for got, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.one_env
def test_a_learning_rate_that_explodes_is_told():
    model, plan, tokens = small()
    with pytest.raises(TrainingError, match=r"step \d+: loss"):
        train(model, plan, tokens, steps=30, lr=1e30, clip=None, warmup=0, optimizer="sgd")


@pytest.mark.one_env
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plan": True}, "plan"),
        ({"text": True}, "text"),
        ({"seed": 1}, "seed"),
        ({"lr": 5e-3}, "settings"),
        ({"model": True}, "model"),
    ],
)
def test_goes_on_with_nothing_else(tmp_path, change, named):
    model, plan, tokens = small()
    file = tmp_path / "checkpoint.safetensors"
    train(model, plan, tokens, checkpoint=file)
    bytes_before = file.read_bytes()
    change = dict(change)
    model = small()[0]
    if change.pop("plan", False):
        plan = gl.SlicePlan(plan.keep.flip(0) if plan.shared is False else ~plan.keep)
    if change.pop("text", False):
        tokens = tokens.flip(1)
    if change.pop("model", False):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(gl.errors.InputError, match=f"run with other {named}"):
        train(model, plan, tokens, checkpoint=file, **change)
    assert file.read_bytes() == bytes_before


@pytest.mark.one_env
def test_a_damaged_checkpoint_is_told(tmp_path):
    model, plan, tokens = small()
    file = tmp_path / "checkpoint.safetensors"
    train(model, plan, tokens, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(gl.errors.FileFormatError, match=r"checkpoint\.safetensors"):
        train(small()[0], plan, tokens, checkpoint=file)


@pytest.mark.one_env
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(tokens=torch.zeros(2, 1, dtype=torch.long)), "expected at least 2"),
        (dict(steps=0), "steps=0"),
        (dict(lr=0.0), "lr=0.0"),
        (dict(train=("q", "w")), "train="),
        (dict(objective="likelihood"), "objective='likelihood'"),
        (dict(momentun=0.9), "momentun"),
        (dict(precision="float8"), "precision='float8'"),
    ],
)
def test_bad_input_is_told_before_anything_is_done(change, said, unchecked):
    model, plan, tokens = small()
    before = copy.deepcopy(model.state_dict())
    arguments = {"tokens": tokens, **change}
    with pytest.raises(gl.GainlensError, match=said):
        train(model, plan, arguments.pop("tokens"), **arguments)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.one_env
def test_a_plan_with_nothing_active_can_not_be_made():
    _, plan, _ = small()
    with pytest.raises(gl.errors.InputError, match="no dimension"):
        gl.SlicePlan(torch.zeros_like(plan.keep))


@pytest.mark.one_env
def test_monitored_text_can_not_be_trained_on_nor_judge():
    model, plan, tokens = small()
    with pytest.raises(gl.errors.InputError, match="monitor shares 1 documents"):
        train(model, plan, tokens[:4], monitor=tokens[3:])
    run = train(model, plan, tokens[:3], monitor=tokens[3:5])
    with pytest.raises(gl.errors.InputError, match="share 2 documents"):
        run.judge(tokens[3:])
    assert run.judge(torch.cat([tokens[5:], tokens[5:].roll(1, 1)])).n_documents == 2


@pytest.mark.one_env
def test_stops_when_the_monitored_rise_is_shown_to_be_small():
    model, plan, tokens = small()
    run = train(model, plan, tokens[:3], monitor=tokens[3:], stop_margin=1e3, check_every=1)
    assert run.facts["stopped"] == "margin" and run.facts["steps"] == 1


@pytest.mark.one_env
def test_what_is_saved_is_the_trained_model_and_computes_with_transformers(tmp_path):
    model, plan, tokens = small()
    run = train(model, plan, tokens[:4], monitor=tokens[4:])
    run.save(tmp_path / "out")
    again = load_hf(tmp_path / "out")
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    kept = gl.SlicePlan.load(tmp_path / "out" / "plan.json")
    gl.slim(again, kept)  # refuses a plan of other weights
    with pytest.raises(gl.errors.InputError, match="already holds something"):
        run.save(tmp_path / "out")
