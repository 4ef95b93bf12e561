"""Gradual schedules: rounds of one run, from one intact model, with one result."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from families import hugging_face

import gainlens as gl
from gainlens.model.loading import load_hf
from gainlens.training import TrainingError, nested_plans, train_virtual_width
from gainlens.training.trainer import Trainer

pytestmark = pytest.mark.one_env


def small():
    """A random Llama of the shared matrix, two plans, the second inside the first, and text."""
    model = hugging_face("LlamaForCausalLM")
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_key_value_heads, d_head)
    keeps = []
    for pairs in (d_head // 4, d_head // 8):
        keep = torch.zeros(shape, dtype=torch.bool)
        keep[..., :pairs] = keep[..., d_head // 2 : d_head // 2 + pairs] = True
        keeps.append(gl.SlicePlan(keep))
    generator = torch.Generator().manual_seed(1)
    return model, keeps, torch.randint(0, config.vocab_size, (10, 12), generator=generator)


def train(model, plan, tokens, **more):
    settings = dict(steps=4, batch=2, progress=False, save_every=1, lr=3e-3)
    return train_virtual_width(model, plan, tokens, **{**settings, **more})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_one_plan_in_a_list_is_the_plan():
    model, (plan, _), tokens = small()
    other = copy.deepcopy(model)
    plain, listed = train(model, plan, tokens), train(other, [plan], tokens)
    assert same(weights(model), weights(other))
    assert plain.curve == listed.curve and "rounds" not in listed.facts


def own_rounds(model, plans, tokens, steps, lr):
    """The same schedule by hand: all weights in plain PyTorch, gradients masked, plain SGD."""
    teacher = copy.deepcopy(model)
    heads = model.config.num_attention_heads
    at = 0
    for plan in plans:
        projections = []
        for layer, keep in enumerate(plan.keep):
            attention = model.model.layers[layer].self_attn
            rows = keep.repeat_interleave(heads // len(keep), 0).reshape(-1, 1)
            for projection, mask in ((attention.q_proj, rows), (attention.k_proj, keep)):
                projection.weight.data *= mask.reshape(-1, 1)
                projections.append((projection.weight, mask.reshape(-1, 1)))
        for _ in range(steps):
            batch = tokens[at : at + 2]
            at += 2
            wanted = teacher(batch).logits.log_softmax(-1).detach()
            got = model(batch).logits.log_softmax(-1)
            loss = (wanted.exp() * (wanted - got)).sum(-1).mean()
            found = torch.autograd.grad(loss, [weight for weight, _ in projections])
            with torch.no_grad():
                for (weight, mask), gradient in zip(projections, found, strict=True):
                    weight -= lr * gradient * mask


def test_rounds_are_those_of_a_plain_loop(monkeypatch):
    """The text goes on where a round ended, the teacher is the intact model all along."""
    model, plans, tokens = small()
    model = model.double()
    oracle, before = copy.deepcopy(model), weights(model)
    monkeypatch.setattr(Trainer, "_order", lambda self, epoch: torch.arange(len(self.documents)))
    run = train(
        model, plans, tokens, optimizer="sgd", lr=0.3, decay="constant", warmup=0, clip=None
    )
    own_rounds(oracle, plans, tokens, steps=2, lr=0.3)
    heads = model.config.num_attention_heads
    for layer, keep in enumerate(plans[-1].keep):
        wide = keep.repeat_interleave(heads // len(keep), 0)
        for letter, active in (("q", wide), ("k", keep)):
            name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
            rows, got = active.flatten(), model.get_parameter(name).detach()
            wanted = oracle.get_parameter(name).detach()
            torch.testing.assert_close(got[rows], wanted[rows], rtol=0, atol=1e-12)
            assert torch.equal(got[~rows], before[name][~rows])  # also what a round had trained
            assert float((got[rows] - before[name][rows]).abs().max()) > 1e-6
    others = {n: t for n, t in before.items() if "q_proj" not in n and "k_proj" not in n}
    assert same(others, weights(model))
    with torch.no_grad():
        torch.testing.assert_close(
            gl.slim(model, run.plan)(tokens).logits, oracle(tokens).logits, rtol=0, atol=1e-10
        )


def test_one_curve_and_one_judgement_against_the_intact_model():
    model, plans, tokens = small()
    intact = copy.deepcopy(model)
    run = train(model, plans, tokens[:6], steps=5, monitor=tokens[6:8], check_every=2)
    steps = [(row["step"], row["round"]) for row in run.curve]
    assert steps == [(0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (5, 2)]
    assert run.facts["steps"] == 5 and run.facts["tokens"] == 5 * 2 * 12
    assert [row["steps"] for row in run.facts["rounds"]] == [2, 3]
    kept = [row["fraction_kept"] for row in run.facts["rounds"]]
    assert kept == [plan.fraction_kept for plan in plans]
    assert run.facts["settings"]["steps"] == 5
    with torch.no_grad():
        logits = intact(tokens[8:]).logits[:, :-1].double().log_softmax(-1)
    wanted = -logits.gather(-1, tokens[8:, 1:, None]).mean((1, 2))
    got = torch.as_tensor(run.losses(tokens[8:], intact=True))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_a_refit_is_carried_where_keys_are_not_trained(tiny_gains, tiny_calibration):
    """Refitted keys that only the first round's refit knows reach the last round."""
    model = load_hf("tiny")
    half = gl.KeyMask.quietest(tiny_gains, 0.5, "qk", "layer")
    cut = gl.ablation.refit(gl.load_model("tiny"), tiny_calibration, half)
    plans = nested_plans(tiny_gains, gl.KeyMask.quietest(tiny_gains, 0.75, "qk", "layer"), 2, "qk")
    plans[0] = gl.SlicePlan.from_cut(cut)
    plans[1] = gl.SlicePlan(plans[1].keep & plans[0].keep)
    alone, rounds = copy.deepcopy(model), copy.deepcopy(model)
    train(alone, plans[0], tiny_calibration, steps=1, train=("q",))
    train(rounds, plans, tiny_calibration, steps=2, train=("q",))
    for layer, keep in enumerate(plans[1].keep):
        name, rows = f"model.layers.{layer}.self_attn.k_proj.weight", keep.flatten()
        found = rounds.get_parameter(name)
        assert torch.equal(found[rows], alone.get_parameter(name)[rows])
        assert not torch.equal(found[rows], model.get_parameter(name)[rows])
        assert torch.equal(found[~rows], model.get_parameter(name)[~rows])


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_rounds_of_a_joint_matrix_are_those_of_separate_ones(tmp_path, family):
    """A bridge keeps query, key and value weights apart; killed between, it goes on the same."""
    from gainlens.export.sources import open_source
    from gainlens.model.wrapping import to_bridge

    tokens = small()[2]
    plain, again = hugging_face(family).double(), hugging_face(family).double()
    bridge = to_bridge(hugging_face(family).double(), family, None)
    keeps = torch.ones(2, 2, 4, 12, dtype=torch.bool)
    keeps[0, ..., [0, 3, 7, 11]] = keeps[1, ..., [0, 3, 1, 4, 7, 11]] = False  # pairs: i, i + 3
    plans = [gl.SlicePlan(keep) for keep in keeps]
    settings = dict(train=("q", "k", "v"), optimizer="sgd", momentum=0.9, lr=0.3, other_lr=0.05)
    runs = [train(model, plans, tokens, **settings) for model in (plain, bridge)]
    assert runs[0].curve[-1]["loss"] == pytest.approx(runs[1].curve[-1]["loss"], abs=1e-9)
    sources = [open_source(model) for model in (plain, bridge)]
    for layer in range(2):
        one, other = (source.attention(layer) for source in sources)
        for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=0, atol=1e-8, msg=name
            )
    file = tmp_path / "checkpoint.safetensors"
    train(copy.deepcopy(again), plans, tokens, checkpoint=file, **settings)
    file.unlink()  # as if killed in the last round
    train(again, plans, tokens, checkpoint=file, **settings)
    assert same(weights(plain), weights(again))


@pytest.mark.parametrize("bad_step", [2, 4])
def test_goes_on_in_the_round_where_it_was(tmp_path, monkeypatch, bad_step):
    model, plans, tokens = small()
    before = weights(model)
    file = tmp_path / "checkpoint.safetensors"
    real, count = Trainer.step, []

    def stops(self, step):
        count.append(step)
        if len(count) == bad_step:
            raise TrainingError("the lights went out")
        return real(self, step)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(TrainingError, match="lights"):
        train(model, plans, tokens, checkpoint=file)
    assert same(before, weights(model))
    monkeypatch.setattr(Trainer, "step", real)
    went_on = train(model, plans, tokens, checkpoint=file)
    whole = small()[0]
    run = train(whole, plans, tokens)
    assert same(weights(whole), weights(model)) and run.curve == went_on.curve
    again = small()[0]
    with pytest.raises(gl.errors.InputError, match="run with other"):
        train(again, [gl.SlicePlan(~plans[1].keep | plans[0].keep), plans[1]], tokens,
              checkpoint=file)  # fmt: skip
    assert same(before, weights(again))


def test_nested_plans_end_at_the_plan(tiny_gains):
    last = gl.KeyMask.quietest(tiny_gains, 0.75, "qk", "layer")
    way = nested_plans(tiny_gains, last, 3, "qk")
    assert len(way) == 3 and torch.equal(way[-1].keep, last.keep)
    kept = [plan.fraction_kept for plan in way]
    assert kept == pytest.approx([0.25 ** (n / 3) for n in (1, 2, 3)], abs=0.1)
    for wide, narrow in itertools.pairwise(way):
        assert not (narrow.keep & ~wide.keep).any() and (wide.keep & ~narrow.keep).any()
    assert [torch.equal(p.keep, last.keep) for p in nested_plans(tiny_gains, last, 1, "qk")] == [
        True
    ]


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ([], r"plan=\[\]"),
        ([1, 0], "plan 2 keeps units that plan 1 has cut"),
        ([0, 1, 0, 1, 1], "steps=4: expected one or more for each of 5"),
        ([0, None], "expected a cut"),
    ],
)
def test_a_schedule_that_is_none_is_told(plans, said, unchecked):
    model, nested, tokens = small()
    before = weights(model)
    if len(plans) == 5:
        nested, plans = [nested[0]], [0] * 5
    given = [None if number is None else nested[number] for number in plans]
    with pytest.raises(gl.errors.InputError, match=said):
        train(model, given, tokens)
    assert same(before, weights(model))


@pytest.mark.parametrize("rounds", [0, 1.5, True])
def test_rounds_are_counted(tiny_gains, rounds, unchecked):
    plan = gl.KeyMask.quietest(tiny_gains, 0.5, "qk", "layer")
    with pytest.raises(gl.errors.InputError, match="rounds="):
        nested_plans(tiny_gains, plan, rounds, "qk")
