"""bfloat16 training casts what it does not train once, and computes the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from slim_families import CONFIGS, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.training import halves
from gainlens.training.student import Student

pytestmark = pytest.mark.one_env
FAMILIES = ["llama", "llama-biased", "qwen2", "gpt2"]


def student_of(name, train=("q", "k")):
    model = random_model(name)
    plan = gl.SlicePlan(random_keep(shape_of(model), CONFIGS[name][1], 0))
    return Student(model, plan, train, "bfloat16")


def text():
    return torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(3))


@torch.enable_grad()
def passed(student):
    """Logits, and the gradient of the trained slices."""
    weights = student.full()
    hidden = student.hidden(text(), weights, cut=True)
    logits = student.logits(hidden.flatten(0, 1), weights)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), student.leaves)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bits_as_casting_for_each_product(name):
    student = student_of(name, ("q", "k", "o"))
    with student.running():
        found = passed(student)
        assert student._halves._copies or name == "gpt2", "no linear module was found"
        student._halves = None
        wanted = passed(student)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_only_what_is_trained_and_the_embedding_keep_their_own():
    student = student_of("llama")
    root = student.root
    trained = {id(part.stored) for part in student.slices}
    with student.running():
        passed(student)
        with student._halves.swapped():
            for module in root.modules():
                for name, tensor in module._parameters.items():
                    if tensor is None:
                        continue
                    half = type(module) is torch.nn.Linear and id(tensor) not in trained
                    assert (tensor.dtype == torch.bfloat16) == half, (module, name)
    assert all(p.dtype == torch.float32 for p in root.parameters())


def test_the_models_own_are_back_after_an_error_and_nothing_is_held_after_a_run():
    student = student_of("llama")
    before = [id(p) for p in student.root.parameters()]
    with student.running():
        with pytest.raises(ZeroDivisionError), student._autocast():
            1 / 0
        assert [id(p) for p in student.root.parameters()] == before
        with student.running():  # as a monitored loss does
            pass
        assert student._halves is not None
    assert student._halves is None


def test_float32_and_divided_weights_make_no_copies(monkeypatch):
    def refuse(self):
        raise AssertionError("copies were asked for")

    monkeypatch.setattr(halves.Halves, "swapped", refuse)
    student = student_of("llama")
    with student.running():
        student.losses(text())  # a loss is in float32 whatever the precision
        student.shards = object()
        with student._autocast():
            pass
