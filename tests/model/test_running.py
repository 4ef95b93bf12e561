"""How models are run: train mode, threads, interruptions, devices, cuts inside cuts."""

from __future__ import annotations

import threading

import pytest
import torch
from families import bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import token_losses
from gainlens.model.hooks import attached, hook_point
from gainlens.model.running import evaluating, model_device


def wrapped(name, model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, name, hf_config=model.config)


def with_dropout(name="GPTNeoXForCausalLM"):
    """A bridge in train mode whose attention, embedding and residual drop out."""
    import transformers
    from families import NO_GROUPS

    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        **NO_GROUPS, attention_dropout=0.5, hidden_dropout=0.5, rotary_pct=0.5
    )
    config.architectures = [name]
    return wrapped(name, transformers.GPTNeoXForCausalLM(config)).train()


def modes(model):
    return [m.training for part in (model, model.original_model) for m in part.modules()]


def test_a_model_in_train_mode_is_measured_in_eval_mode_and_left_as_it_was():
    model, tokens = with_dropout(), family_tokens()
    before = modes(model)
    assert any(before)
    sites = key_sites(model)
    gains = gl.probe_gains(model, tokens, ("qk", "fisher"), progress=False)
    loss = token_losses(model, tokens)
    assert modes(model) == before
    model.eval()
    model.original_model.eval()
    again = gl.probe_gains(model, tokens, ("qk", "fisher"), progress=False)
    assert key_sites(model) is sites
    for name in ("qk", "fisher"):
        assert torch.equal(gains.score(name), again.score(name))
    assert torch.equal(loss, token_losses(model, tokens))


def test_surgery_in_train_mode():
    model = with_dropout()
    text = torch.randint(0, 64, (12, 12), generator=torch.Generator().manual_seed(3))
    gains = gl.probe_gains(model, text[:6], progress=False)
    arguments = dict(fractions=(0.5,), orders=("quietest",), progress=False, fast=False)
    first = gl.surgery(model, text[6:], gains, **arguments).table()
    second = gl.surgery(model, text[6:], gains, **arguments).table()
    model.eval()
    model.original_model.eval()
    third = gl.surgery(model, text[6:], gains, **arguments).table()
    losses = [[row["loss"] for row in table] for table in (first, second, third)]
    assert losses[0] == losses[1] == losses[2]


def test_eval_mode_is_undone_after_an_error():
    model = with_dropout()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(modes(model))
        raise ZeroDivisionError
    assert modes(model) == before


def test_two_threads_that_probe_one_model_get_what_one_thread_gets():
    model = wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM"))
    texts = [family_tokens(6, 16, seed=i) for i in range(2)]
    wanted = [gl.probe_gains(model, t, progress=False, tokens_per_batch=16) for t in texts]
    found = {}

    def probe(index):
        found[index] = gl.probe_gains(model, texts[index % 2], progress=False, tokens_per_batch=16)

    threads = [threading.Thread(target=probe, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, gains in found.items():
        assert gains.n_tokens == 96
        assert torch.equal(gains.score("qk"), wanted[index % 2].score("qk"))
    assert len(found) == 4


def test_a_thread_that_waits_for_a_cut_sees_the_intact_model():
    model = wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM"))
    tokens = family_tokens()
    wanted = token_losses(model, tokens)
    mask = gl.KeyMask(torch.zeros(key_sites(model).shape, dtype=torch.bool))
    found = []
    thread = threading.Thread(target=lambda: found.append(token_losses(model, tokens)))
    with gl.ablate(model, mask):
        cut = token_losses(model, tokens)
        thread.start()
        thread.join(0.5)
        assert not found
    thread.join()
    assert torch.equal(found[0], wanted)
    assert not torch.allclose(cut, wanted, atol=1e-3)


def test_tokens_that_someone_else_runs_are_noticed():
    """The model itself is not locked: who calls it while it is probed adds to the sums."""
    model = wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM"))
    tokens = family_tokens(4, 16)

    def batches():
        yield tokens[:2]
        with torch.inference_mode():
            model(tokens)
        yield tokens[2:]

    with pytest.raises(gl.errors.InputError, match="another thread"):
        gl.probe_gains(model, batches(), progress=False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_hooks_are_attached_leaves_none(when, monkeypatch):
    model = wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM"))
    tokens = family_tokens()
    mask = gl.KeyMask(torch.zeros(key_sites(model).shape, dtype=torch.bool))
    with torch.inference_mode():
        wanted = model(tokens)
    point = hook_point(model, "blocks.1.attn.hook_rot_k")
    add = type(point).add_hook

    def interrupted(self, *args, **kwargs):
        if self is not point:
            return add(self, *args, **kwargs)
        if when == "after":
            self.register_forward_hook(lambda module, args, output: output * 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(point), "add_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), gl.ablate(model, mask):
        pass
    monkeypatch.undo()
    with torch.inference_mode():
        assert torch.equal(model(tokens), wanted)
    assert not point._forward_hooks


def test_hooks_of_the_users_own_stay():
    model = wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM"))
    seen = []
    name = "blocks.0.attn.hook_rot_k"
    point = hook_point(model, name)
    with attached(model, [(name, lambda x, hook: seen.append("ours"))]):
        point.add_hook(lambda x, hook: seen.append("theirs"))
    with torch.inference_mode():
        model(family_tokens())
    assert seen == ["theirs"]
    point.remove_hooks()


def test_measuring_inside_a_cut_is_said_or_refused():
    model, tokens = bridge("LlamaForCausalLM"), family_tokens(12, 12)
    gains = gl.probe_gains(model, tokens[:6], progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5)
    with gl.ablate(model, mask):
        with pytest.warns(UserWarning, match="as cut"):
            gl.probe_gains(model, tokens[:6], progress=False)
        with pytest.raises(gl.errors.InputError, match=r"inside gainlens\.ablate"):
            gl.surgery(model, tokens[6:], gains, fractions=(0.5,), progress=False)
        with pytest.raises(gl.errors.InputError, match=r"inside gainlens\.ablate"):
            gl.ablation.refit(model, tokens[:6], mask, progress=False)
    gl.surgery(model, tokens[6:], gains, fractions=(0.5,), orders=("quietest",), progress=False)


def test_cutting_in_rounds_warns_of_nothing(recwarn):
    model = bridge("LlamaForCausalLM")
    gl.ablation.greedy_mask(model, family_tokens(6, 12), 0.5, score="qk", rounds=2, progress=False)
    assert not [w for w in recwarn if "as cut" in str(w.message)]


class OnMeta(torch.nn.Linear):
    """As accelerate leaves an offloaded layer: its weight is elsewhere until it is called."""

    def forward(self, x):
        return torch.nn.functional.linear(x, *self.elsewhere)


def offloaded(name="LlamaForCausalLM", meta=True):
    """A model whose layer 0 has its key projection (the first parameters too) offloaded."""
    model = hugging_face(name)
    layer = model.model.layers[0].self_attn.k_proj
    weight = layer.weight.detach().clone()
    layer.__class__, layer.elsewhere = OnMeta, (weight, None)
    layer._parameters["weight"] = torch.nn.Parameter(weight.to("meta"), False)
    layer._hf_hook = type("Hook", (), {"weights_map": {"weight": weight} if meta else None})()
    return model


def test_an_offloaded_model_is_probed_by_forward_passes():
    tokens = family_tokens()
    wanted = gl.probe_gains(
        wrapped("LlamaForCausalLM", hugging_face("LlamaForCausalLM")), tokens, progress=False
    )
    gains = gl.probe_gains(wrapped("LlamaForCausalLM", offloaded()), tokens, progress=False)
    assert torch.allclose(gains.score("qk"), wanted.score("qk"), rtol=1e-5)
    assert gains.model.fingerprint == wanted.model.fingerprint


def test_weights_that_can_not_be_read_are_refused_before_any_work():
    model = wrapped("LlamaForCausalLM", offloaded(meta=False))

    def never():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(gl.errors.UnsupportedModelError, match="not in memory"):
        gl.probe_gains(model, never(), progress=False)


class Packed(torch.nn.Module):
    """A linear layer whose weight is packed into bytes, as bitsandbytes keeps it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        packed = (linear.weight.detach() / scale).round().to(torch.int8).flatten()[:, None]
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.shape, self.bias = linear.weight.shape, linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float().reshape(self.shape) * self.scale)


def quantised(change=0):
    model = hugging_face("LlamaForCausalLM")
    for layer in model.model.layers:
        for owner, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                setattr(owner, name, Packed(getattr(owner, name)))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] += change
    return model


def test_a_quantised_model_is_probed_by_forward_passes():
    plain = quantised()
    for module in plain.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Packed):
                linear = torch.nn.Linear(child.shape[1], child.shape[0], bias=False)
                linear.weight.data = child.weight.float().reshape(child.shape) * child.scale
                setattr(module, name, linear)
    tokens = family_tokens()
    wanted = gl.probe_gains(wrapped("LlamaForCausalLM", plain), tokens, progress=False)
    gains = gl.probe_gains(wrapped("LlamaForCausalLM", quantised()), tokens, progress=False)
    assert torch.allclose(gains.score("qk"), wanted.score("qk"), rtol=1e-5)
    assert model_fingerprint(quantised()) == model_fingerprint(quantised())
    assert model_fingerprint(quantised(1)) != model_fingerprint(quantised())


def test_the_device_is_that_of_the_embedding():
    assert model_device(offloaded()) == torch.device("cpu")
    model = hugging_face("LlamaForCausalLM")
    first = torch.nn.Parameter(torch.zeros(1, device="meta"))
    model._parameters["placeholder"] = first
    assert next(model.parameters()).is_meta
    assert model_device(model) == torch.device("cpu")
    assert model_device(wrapped("LlamaForCausalLM", model)) == torch.device("cpu")
