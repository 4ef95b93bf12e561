"""Training at virtual width is training the slim model; ghosts and everything else stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from releases import HAS_HOOKED
from slim_families import CONFIGS, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.training import train_virtual_width

PLAIN = ["llama", "llama-biased", "qwen2", "mistral", "neox", "gpt2"]
STEADY = dict(decay="constant", warmup=0, clip=None, progress=False)


def text(rows=3, length=14, seed=3):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def wide_model(name):
    """In float64, so that rounding can't hide a wrong update."""
    return random_model(name).double()


def plan_for(model, name, seed=0):
    return gl.SlicePlan(random_keep(shape_of(model), CONFIGS[name][1], seed))


def own_loop(model, trained, tokens, optimizer, steps):
    """Plain PyTorch: next-token loss on all tokens at once."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is t for t in trained))
    for _ in range(steps):
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        yield float(loss.detach())
        optimizer.step()


OPTIMIZERS = {
    "sgd": (
        dict(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.02),
    ),
    "adamw": (
        dict(optimizer="adamw", lr=3e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    ),
}


@pytest.mark.one_env
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PLAIN)
def test_virtual_width_trains_as_the_slim_model_does(name, optimizer):
    settings, make = OPTIMIZERS[optimizer]
    tokens = text()
    start = wide_model(name)
    plan = plan_for(start, name)
    thin = gl.slim(start, plan)
    trained = [
        p
        for n, p in thin.named_parameters()
        if any(f"{letter}_proj" in n for letter in "qk") and p.any()
    ]
    first = [p.detach().clone() for p in trained]
    losses = own_loop(thin, trained, tokens, make(trained), 4)
    for steps in (1, 2, 3):
        model = wide_model(name)
        run = train_virtual_width(
            model, plan, tokens, steps=steps, objective="next_token", batch=3, **settings, **STEADY
        )
        assert run.curve[steps]["loss"] == pytest.approx(next(losses), abs=1e-12)
        if steps == 3:
            next(losses)  # brings the slim model to its third step
            got = dict(gl.slim(model, run.plan).named_parameters())
            for key, parameter in thin.named_parameters():
                torch.testing.assert_close(got[key], parameter, rtol=0, atol=1e-10)
            assert all(
                float((p - old).detach().abs().max()) > 1e-4
                for p, old in zip(trained, first, strict=True)
            )


@pytest.mark.one_env
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_with_a_norm_ghosts_are_masked_after_it_and_count_in_its_statistic(name):
    tokens, model = text(), wide_model(name)
    plan = plan_for(model, name)
    oracle = wide_model(name)
    heads = oracle.config.num_attention_heads
    trained = []
    for layer, keep in enumerate(plan.keep):
        attention = oracle.model.layers[layer].self_attn
        by_head = name == "gemma3"  # [batch, head, pos, d] there, [batch, pos, head, d] here

        def mask(module, args, out, keep=keep, by_head=by_head):
            return out * (keep[:, None] if by_head else keep)

        attention.k_norm.register_forward_hook(mask)
        for projection, rows in (
            (attention.q_proj, keep.repeat_interleave(heads // len(keep), 0)),
            (attention.k_proj, keep),
        ):
            rows = rows.reshape(-1, 1)
            projection.weight.register_hook(lambda grad, rows=rows: grad * rows)
            trained.append(projection.weight)
    optimizer = torch.optim.SGD(trained, lr=0.3)
    for _ in own_loop(oracle, trained, tokens, optimizer, 3):
        pass
    train_virtual_width(
        model, plan, tokens, steps=3, objective="next_token", batch=3, optimizer="sgd", lr=0.3,
        **STEADY,
    )  # fmt: skip
    for (key, got), (_, wanted) in zip(
        model.named_parameters(), oracle.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10, msg=key)


def rows_of(model):
    """(q, k) of every layer as [head, d_head, d_model], by the exporter's own reader."""
    from gainlens.export.sources import open_source

    source = open_source(model)
    return [source.attention(layer) for layer in range(source.n_layers)]


KINDS = [("bridge", name) for name in ("llama", "mistral", "qwen2", "qwen3", "neox", "gpt2")]
if HAS_HOOKED:
    KINDS += [("hooked", name) for name in ("llama", "mistral", "qwen2", "qwen3")]


def of_kind(name, kind):
    from gainlens.model.wrapping import to_bridge, to_hooked

    model = wide_model(name)
    return {"bridge": to_bridge, "hooked": to_hooked}[kind](model, name, None)


@pytest.mark.parametrize("kind, name", KINDS)
def test_every_kind_trains_as_the_transformers_model_does(kind, name):
    """All weights, each at its own rate: nothing that one kind has beside the others is trained."""
    tokens, plain, model = text(), wide_model(name), of_kind(name, kind)
    plan = plan_for(plain, name)
    settings = dict(
        steps=3, batch=3, lr=0.2, other_lr=0.05, optimizer="sgd", momentum=0.9, weight_decay=0.05,
        train=("q", "k", "v", "o", "mlp", "norm"), objective="next_token", **STEADY,
    )  # fmt: skip
    ghosts = [
        [None if t is None else t.clone() for t in (w.q, w.k, w.q_bias, w.k_bias)]
        for w in rows_of(model)
    ]
    run, wanted = (train_virtual_width(m, plan, tokens, **settings) for m in (model, plain))
    rounding = 1e-6 if kind == "hooked" else 1e-10  # a HookedTransformer turns in float32
    for step in (1, 2, 3):
        assert run.curve[step]["loss"] == pytest.approx(wanted.curve[step]["loss"], abs=rounding)
    got = dict(gl.slim(model, run.plan).named_parameters())
    for key, parameter in gl.slim(plain, wanted.plan).named_parameters():
        torch.testing.assert_close(got[key], parameter, rtol=0, atol=10 * rounding, msg=key)
    for keep, weights, before in zip(plan.keep, rows_of(model), ghosts, strict=True):
        after = (weights.q, weights.k, weights.q_bias, weights.k_bias)
        for one, other in zip(after, before, strict=True):
            if other is not None:
                cut = ~keep.repeat_interleave(len(other) // len(keep), 0)
                assert torch.equal(one[cut], other[cut]) and not torch.equal(one[~cut], other[~cut])


@pytest.mark.one_env
@pytest.mark.parametrize("name", ["neox", "gpt2"])
def test_values_in_a_joint_matrix_have_the_other_rate(name):
    """At the same rate for all, and at another for values alone, beside plain PyTorch."""
    tokens, model, oracle = text(), wide_model(name), wide_model(name)
    plan = gl.SlicePlan.identity(model)
    found = {n: p for n, p in oracle.named_parameters() if "query_key_value" in n or "c_attn" in n}
    logits = oracle(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(found.values()))
    train_virtual_width(
        model, plan, tokens, steps=1, batch=3, objective="next_token", optimizer="sgd", lr=0.3,
        other_lr=0.1, train=("q", "k", "v"), **STEADY,
    )  # fmt: skip
    d_head, n_heads = 8, 4
    for (key, before), gradient in zip(found.items(), gradients, strict=True):
        if name == "gpt2":  # queries, keys, values along the last axis
            rate = torch.tensor([0.3, 0.3, 0.1]).repeat_interleave(n_heads * d_head)
        else:  # head by head along the first
            rate = torch.tensor([0.3, 0.3, 0.1]).repeat_interleave(d_head).repeat(n_heads)
            rate = rate.reshape(-1, *[1] * (before.ndim - 1))
        wanted = before.detach() - rate.double() * gradient
        torch.testing.assert_close(model.get_parameter(key).detach(), wanted, rtol=0, atol=1e-8)


def test_ghosts_and_all_other_weights_stay_bit_for_bit(any_tiny, tiny_gains):
    import copy

    model = copy.deepcopy(any_tiny)
    plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer"))
    tokens = gl.load_tokens("sotu", model, n_docs=4, length=32, split="training")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [(w.q.clone(), w.k.clone()) for w in rows_of(model)]
    wanted_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    run = train_virtual_width(model, plan, tokens, steps=3, weight_decay=0.1, progress=False)
    for layer, (weights, (q, k)) in enumerate(zip(rows_of(model), rows, strict=True)):
        keep = plan.keep[layer]
        wide = keep.repeat_interleave(len(q) // len(k), 0)
        assert torch.equal(weights.q[~wide], q[~wide]) and torch.equal(weights.k[~keep], k[~keep])
        assert not (weights.q[wide] == q[wide]).all(-1).any()
        assert not (weights.k[keep] == k[keep]).all(-1).any()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert 0 < len(changed) <= 2 * len(rows)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted_grad
    assert all(p.grad is None for p in model.parameters())
    assert run.plan.fingerprint != tiny_gains.model.fingerprint


def test_the_three_kinds_of_model_learn_the_same(tiny_gains):
    from gainlens.model.loading import load_hf

    plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer"))
    bridge = gl.load_model("tiny")
    tokens = gl.load_tokens("sotu", bridge, n_docs=4, length=32, split="training")
    models = [load_hf("tiny"), bridge]
    if HAS_HOOKED:
        models.append(gl.load_model("tiny", kind="hooked"))
    found = []
    for model in models:
        run = train_virtual_width(
            model, plan, tokens, steps=3, lr=0.3, optimizer="sgd", attention=0.5, progress=False
        )
        found.append((run.curve[-1]["loss"], rows_of(model)))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        for got, wanted in zip(weights, found[0][1], strict=True):
            torch.testing.assert_close(got.q, wanted.q, rtol=0, atol=2e-6)
            torch.testing.assert_close(got.k, wanted.k, rtol=0, atol=2e-6)


def test_the_result_slims_without_loss(tiny_gains, tiny_calibration, tiny_validation):
    model = gl.load_model("tiny")
    mask = gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer")
    cut = gl.ablation.refit(model, tiny_calibration, mask, progress=False)
    tokens = gl.load_tokens("sotu", model, n_docs=6, length=48, split="training")
    run = train_virtual_width(model, cut, tokens, steps=6, train=("q", "k", "v"), progress=False)
    thin = gl.slim(model, run.plan)
    with torch.no_grad(), gl.ablate(model, run.plan.mask):
        wanted = model(tiny_validation, return_type="logits")
    with torch.no_grad():
        got = thin(tiny_validation).logits
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max().clamp_min(1))
    torch.testing.assert_close(
        torch.tensor(run.losses(tiny_validation)),
        torch.nn.functional.cross_entropy(
            got[:, :-1].transpose(1, 2), tiny_validation[:, 1:], reduction="none"
        ).double().mean(1),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_state_and_gradients_take_what_the_active_slice_needs(tiny_gains):
    model = gl.load_model("tiny")
    plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer"))
    tokens = gl.load_tokens("sotu", model, n_docs=4, length=32, split="training")
    run = train_virtual_width(model, plan, tokens, steps=1, progress=False)
    group, d_model = 2, 128
    numbers = int(plan.keep.sum()) * (group + 1) * d_model
    assert run.facts["gradient_bytes"] == 4 * numbers
    assert 8 * numbers <= run.facts["optimizer_bytes"] <= 1.05 * 8 * numbers
