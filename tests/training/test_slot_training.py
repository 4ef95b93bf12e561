"""Training slots at virtual width is training the slim model of the same slots."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from releases import HAS_HOOKED
from slim_families import random_model

import gainlens as gl
from gainlens.ablation import SlotCut
from gainlens.errors import InputError
from gainlens.model.loading import load_hf
from gainlens.model.wrapping import to_bridge, to_hooked
from gainlens.training import train_virtual_width
from gainlens.training.rounds import nested_plans
from gainlens.training.student import Student
from gainlens.training.trainer import Trainer

STEADY = dict(
    objective="next_token", batch=3, optimizer="sgd", lr=0.3, decay="constant", warmup=0,
    clip=None, progress=False,
)  # fmt: skip
TOKENS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(3))


def slots_of(model, seed=7):
    """Random maps into a quarter of the pairs, at random frequencies of each head."""
    config = model.config
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(config.num_hidden_layers, n_kv, d, dtype=torch.bool)
    keep[..., : d // 4] = keep[..., d // 2 : d // 2 + d // 4] = True
    frequencies = torch.rand(*keep.shape[:2], d // 2, generator=generator, dtype=torch.float64)

    def maps(kept):
        return torch.randn(*kept.shape, d, generator=generator) * kept[..., None] / d**0.5

    own = gl.model.key_sites(to_bridge(random_model("llama"), "x", None)).frequencies
    queries = maps(keep.repeat_interleave(n_heads // n_kv, 1))
    return SlotCut(gl.KeyMask(keep), queries, maps(keep), frequencies, own)


def of_kind(kind):
    model = random_model("llama")
    if kind == "transformers":
        return model
    return {"bridge": to_bridge, "hooked": to_hooked}[kind](model, "x", None)


KINDS = [
    pytest.param("transformers", marks=pytest.mark.one_env),
    pytest.param("bridge", marks=pytest.mark.one_env),
    pytest.param("hooked", marks=pytest.mark.skipif(not HAS_HOOKED, reason="needs 3.9")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_train_as_the_slim_model_does(kind):
    cut = slots_of(random_model("llama"))
    thin = gl.slim(random_model("llama"), cut)
    trained = [p for n, p in thin.named_parameters() if "q_proj" in n or "k_proj" in n]
    for parameter in thin.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    optimizer = torch.optim.SGD(trained, lr=0.3)
    first, losses = [p.detach().clone() for p in trained], []
    for _ in range(3):
        logits = thin(TOKENS, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    model = of_kind(kind)
    run = train_virtual_width(model, cut, TOKENS, steps=3, **STEADY)
    assert [row["loss"] for row in run.curve[1:]] == pytest.approx(losses, abs=2e-6)
    got = dict(gl.slim(model, run.plan).named_parameters())
    for key, parameter in thin.named_parameters():
        torch.testing.assert_close(got[key], parameter, rtol=0, atol=1e-5, msg=key)
    assert all(
        float((p - old).detach().abs().max()) > 1e-4 for p, old in zip(trained, first, strict=True)
    )


@pytest.mark.one_env
def test_the_intact_model_does_not_turn():
    """The teacher is the model before the cut, at its own frequencies."""
    model = random_model("llama")
    student = Student(model, gl.SlicePlan.from_cut(slots_of(model)))
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    torch.testing.assert_close(student.token_losses(TOKENS, intact=True), wanted, rtol=0, atol=1e-5)
    assert (student.token_losses(TOKENS) - wanted).abs().max() > 0.1


@pytest.mark.one_env
def test_slots_of_a_saved_run(tmp_path):
    model = random_model("llama")
    run = train_virtual_width(model, slots_of(model), TOKENS, steps=2, **STEADY)
    run.save(tmp_path / "healed")
    plan = gl.SlicePlan.load(tmp_path / "healed" / "plan.json")
    assert torch.equal(plan.frequencies, run.plan.frequencies)
    thin = gl.slim(load_hf(str(tmp_path / "healed")), plan)
    wanted = run.losses(TOKENS)
    with torch.no_grad():
        logits = thin(TOKENS, use_cache=False).logits[:, :-1]
    got = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    assert got.mean(1).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.one_env
def test_a_run_of_other_slots_does_not_go_on(tmp_path):
    model = random_model("llama")
    cut = slots_of(model)
    plan = gl.SlicePlan.from_cut(cut)
    file = tmp_path / "run.safetensors"
    train_virtual_width(model, plan, TOKENS, steps=1, checkpoint=file, **STEADY)
    other = replace(plan, frequencies=plan.frequencies * 2)
    with pytest.raises(InputError, match="plan"):
        train_virtual_width(
            random_model("llama"), other, TOKENS, steps=1, checkpoint=file, **STEADY
        )


@pytest.mark.one_env
def test_slots_are_not_cut_in_rounds(tiny_gains):
    model = random_model("llama")
    plan = gl.SlicePlan.from_cut(slots_of(model))
    with pytest.raises(InputError, match="slot"):
        train_virtual_width(model, [plan, plan], TOKENS, steps=2, **STEADY)
    with pytest.raises(InputError, match="slot"):
        nested_plans(tiny_gains, plan, 2)


def shared_slots(model, factor=None):
    """One set for all heads: the model's own frequencies, times ``factor``."""
    config = model.config
    n_kv, d = config.num_key_value_heads, config.head_dim
    keep = torch.zeros(config.num_hidden_layers, n_kv, d, dtype=torch.bool)
    keep[..., : d // 4] = keep[..., d // 2 : d // 2 + d // 4] = True
    own = gl.model.key_sites(to_bridge(random_model("llama"), "x", None)).frequencies
    frequencies = own[:, None].expand(-1, n_kv, -1).double().clone()
    if factor is not None:
        frequencies[..., : d // 4] *= factor
    return gl.SlicePlan(keep, frequencies=frequencies)


@pytest.mark.one_env
def test_gradient_of_the_frequencies_is_that_of_finite_differences():
    student = Student(
        random_model("llama").double(), shared_slots(random_model("llama"), 1.5), ("frequencies",)
    )
    (leaf,) = student.leaves
    assert leaf.shape[0] == 1, "one set of frequencies is one row"

    def loss():
        weights = student.full()
        hidden = student.hidden(TOKENS, weights, cut=True).flatten(0, 1)
        return student.logits(hidden, weights).double().log_softmax(-1)[:, 7].mean()

    with student.running(), torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(), [leaf])
    step = 1e-3
    kept = shared_slots(random_model("llama")).keep[0, 0, : leaf.shape[1]]
    assert not gradient[0, ~kept].any() and (gradient[0, kept].abs() > 1e-7).any()
    for pair in kept.nonzero().flatten().tolist():
        found = []
        for sign in (1, -1):
            with torch.no_grad(), student.running():
                leaf[0, pair] += sign * step
                found.append(float(loss()))
                leaf[0, pair] -= sign * step
        slope = (found[0] - found[1]) / (2 * step)
        assert float(gradient[0, pair]) == pytest.approx(slope, rel=0.02, abs=1e-6)


@pytest.mark.one_env
def test_trained_frequencies_go_with_the_plan(tmp_path):
    """One set stays one set, the rest keeps its bits, and the slim model turns by them."""
    model = random_model("llama")
    plan = shared_slots(model, 1.3)
    before = plan.frequencies.clone()
    run = train_virtual_width(
        model, plan, TOKENS, steps=3, train=("q", "k", "frequencies"), frequency_lr=0.1,
        **{**STEADY, "optimizer": "adamw", "lr": 1e-2},
    )  # fmt: skip
    pairs = plan.keep[..., : before.shape[-1]]
    assert run.plan.shared
    assert ((run.plan.frequencies - before)[pairs].abs() > 1e-3 * before[pairs]).all()
    assert torch.equal(run.plan.frequencies[~pairs], before[~pairs])
    assert torch.equal(plan.frequencies, before), "the caller's plan is the caller's"
    run.save(tmp_path / "healed")
    kept = gl.SlicePlan.load(tmp_path / "healed" / "plan.json")
    assert torch.equal(kept.frequencies, run.plan.frequencies)
    thin = gl.slim(load_hf(str(tmp_path / "healed")), kept)
    with torch.no_grad():
        logits = thin(TOKENS, use_cache=False).logits[:, :-1]
    got = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    assert got.mean(1).tolist() == pytest.approx(run.losses(TOKENS).tolist(), abs=1e-5)


@pytest.mark.one_env
def test_frequencies_that_are_off_find_back():
    """Planted: only the frequencies differ from the intact model's, and only they are trained."""
    model = random_model("llama")
    plan = replace(shared_slots(model, 1.2), keep=torch.ones_like(shared_slots(model).keep))
    own = gl.model.key_sites(to_bridge(random_model("llama"), "x", None)).frequencies.double()
    run = train_virtual_width(
        model, plan, TOKENS, steps=60, train=("frequencies",), frequency_lr=2e-2,
        **{**STEADY, "optimizer": "adamw", "objective": "divergence", "decay": "cosine"},
    )  # fmt: skip
    off = plan.frequencies != own[:, None]
    assert off.any()
    assert run.curve[-1]["loss"] < 0.05 * run.curve[1]["loss"]
    fast = off & (plan.frequencies > 0.05)  # slower pairs hardly turn within this text
    assert ((run.plan.frequencies / own[:, None] - 1).abs()[fast] < 0.05).all()


@pytest.mark.one_env
def test_frequencies_resume_to_the_same_bytes(tmp_path):
    plan = shared_slots(random_model("llama"), 1.3)
    how = {**STEADY, "train": ("k", "frequencies"), "optimizer": "adamw", "lr": 1e-2}
    whole = train_virtual_width(random_model("llama"), plan, TOKENS, steps=4, **how)
    file = tmp_path / "run.safetensors"
    real = Trainer.step

    def killed(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        train_virtual_width(
            random_model("llama"), plan, TOKENS, steps=4, checkpoint=file, save_every=1, **how
        )
    again = train_virtual_width(
        random_model("llama"), plan, TOKENS, steps=4, checkpoint=file, save_every=1, **how
    )
    assert torch.equal(again.plan.frequencies, whole.plan.frequencies)


@pytest.mark.one_env
@pytest.mark.parametrize("plan", ["mask", "grid"])
def test_frequencies_that_are_not_free_are_refused(plan):
    model = random_model("llama")
    slots = shared_slots(model)
    given = {
        "mask": replace(slots, frequencies=None),
        "grid": replace(slots, facts={"grid": True}),
    }[plan]
    with pytest.raises(InputError, match=r"no slots|slots on a grid"):
        train_virtual_width(model, given, TOKENS, steps=1, train=("frequencies",), progress=False)
