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
