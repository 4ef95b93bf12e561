"""The costly scores against their definitions, written out by other means."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.model.hooks import attached
from gainlens.probes.spread import logit_spread

ROTATED = [name for name, row in FAMILIES.items() if row[4]]


def gate_gradients(model, document, layer, dims):
    """d(mean loss)/d(gate) for one key head after another, by an explicit gate."""
    sites = gl.model.key_sites(model)
    gate = torch.ones(sites.n_kv_heads, requires_grad=True)

    def put(keys, hook):
        scale = torch.ones(keys.shape[2:])
        scale = scale.index_put(
            (torch.arange(sites.n_kv_heads)[:, None], torch.tensor(dims)[None]),
            gate[:, None].expand(-1, len(dims)),
        )
        return keys * scale

    with attached(model, [(sites.key_hook(layer, sites.stages[-1]), put)]):
        logits = model(document[None], return_type="logits")
    logp = logits[0, :-1].log_softmax(-1)
    loss = -logp[torch.arange(len(document) - 1), document[1:]].mean()
    return torch.autograd.grad(loss, gate)[0].double()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "CohereForCausalLM",
                                  "GPTNeoXForCausalLM", "GPT2LMHeadModel"])  # fmt: skip
def test_fisher_is_the_squared_gradient_of_a_gate(name):
    if name not in FAMILIES:
        pytest.skip("refused on this transformer-lens")
    model, tokens = bridge(name), family_tokens()
    gains = gl.probe_gains(model, tokens, ("fisher",), progress=False)
    partner = gains.model.partner
    for layer, dim in ((0, 1), (1, 4)):
        pair = sorted({dim, int(partner[dim])})
        each = torch.stack([gate_gradients(model, d, layer, pair) for d in tokens])
        wanted = each.square().mean(0).sqrt().float()
        got = gains.score("fisher", unit="pair")[layer, :, dim]
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-8)
        if gl.model.key_sites(model).rotated_fires or not gains.model.rotary_dim:
            each = torch.stack([gate_gradients(model, d, layer, [dim]) for d in tokens])
            wanted = each.square().mean(0).sqrt().float()
            got = gains.score("fisher")[layer, :, dim]
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-8)


def test_fisher_in_your_own_loop_and_in_batches(any_tiny, tiny_calibration):
    tokens = tiny_calibration[:3, :24]
    whole = gl.probe_gains(any_tiny, tokens, ("fisher",), progress=False)
    parts = gl.probe_gains(any_tiny, tokens[:2], ("fisher",), progress=False) + gl.probe_gains(
        any_tiny, tokens[2:], ("fisher",), progress=False
    )
    with gl.KeyGainProbe(any_tiny, ("fisher",)) as probe:
        logits = any_tiny(tokens, return_type="logits")
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        losses.reshape(3, -1).mean(1).sum().backward()
    any_tiny.zero_grad(set_to_none=True)
    for other in (parts, probe.gains()):
        for unit in ("dim", "pair"):
            a, b = whole.score("fisher", unit=unit), other.score("fisher", unit=unit)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert whole.score("fisher").max() > 0


def test_fisher_leaves_the_model_alone(tiny, tiny_calibration):
    before = {n: p.requires_grad for n, p in tiny.named_parameters()}
    with torch.inference_mode():  # a caller's mode must not empty the gradient
        made_here = tiny_calibration[:2, :16].clone()
        gains = gl.probe_gains(tiny, made_here, ("fisher",), progress=False)
    assert gains.score("fisher").max() > 0
    assert all(p.grad is None for p in tiny.parameters())
    assert before == {n: p.requires_grad for n, p in tiny.named_parameters()}
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_fisher_without_a_backward_pass_says_so(tiny, tiny_calibration):
    probe = gl.KeyGainProbe(tiny, ("fisher",))
    with probe, torch.no_grad():
        tiny(tiny_calibration[:1])
    with pytest.raises(gl.errors.SilentSiteError, match="backward"):
        probe.gains()


def test_scores_that_were_not_asked_for(tiny_gains):
    for score in ("fisher", "logit_std"):
        with pytest.raises(gl.errors.InputError, match=score):
            tiny_gains.score(score)


@pytest.mark.parametrize("name", ROTATED)
def test_logit_std_is_the_spread_of_the_share(name):
    """One query at a time, from the model's own pattern, as the definition says."""
    model, tokens = bridge(name), family_tokens(rows=2, length=7)
    gains = gl.probe_gains(model, tokens, ("logit_std",), progress=False)
    sites = gl.model.key_sites(model)
    config = model.original_model.config
    own = getattr(config, "attention_multiplier", None)
    scale = own or (getattr(config, "query_pre_attn_scalar", None) or sites.d_head) ** -0.5
    layer, seen = 1, {}
    prefix = f"blocks.{layer}.attn.hook_"
    hooks = [(prefix + n, lambda x, hook, n=n: seen.update({n: x.detach().double()}))
             for n in ("rot_q", "rot_k", "pattern")]  # fmt: skip
    with torch.inference_mode(), attached(model, hooks):
        model(tokens, return_type="logits")
    q, k, a = seen["rot_q"], seen["rot_k"], seen["pattern"]
    for dims in ([2], sorted({2, int(sites.partner[2])})):
        wanted = torch.zeros(sites.n_kv_heads, dtype=torch.float64)
        for b in range(2):
            for h in range(sites.n_heads):
                for i in range(7):
                    share = k[b, :, h // sites.group_size, dims] @ q[b, i, h, dims]
                    share = share * scale
                    centre = (a[b, h, i] * share).sum()
                    spread = (a[b, h, i] * (share - centre).square()).sum()
                    wanted[h // sites.group_size] += spread
        wanted = (wanted / (2 * 7 * sites.group_size)).sqrt()
        unit = "pair" if len(dims) == 2 else "dim"
        got = gains.score("logit_std", unit=unit)[layer, :, 2].double()
        assert torch.allclose(got, wanted, rtol=1e-3)


def test_a_key_that_is_the_same_everywhere_has_no_spread():
    keys = torch.randn(1, 1, 2, 4).expand(2, 6, 2, 4)
    queries = torch.randn(2, 6, 4, 4)
    pattern = torch.rand(2, 4, 6, 6).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    square, cross = logit_spread(queries, keys, pattern, torch.tensor([2, 3, 0, 1]))
    assert square.abs().max() < 1e-4
    assert cross.abs().max() < 1e-4


def test_silent_models_get_the_same_spread_from_a_computed_rotation():
    """GPT-NeoX fires no hook after its rotation; a pair's spread is then still the model's."""
    model, tokens = bridge("GPTNeoXForCausalLM"), family_tokens()
    gains = gl.probe_gains(model, tokens, ("logit_std",), progress=False)
    assert gains.score("logit_std", unit="pair").min() > 0


def test_a_stage_that_a_score_does_not_have_is_named(tiny, tiny_calibration):
    gains = gl.probe_gains(tiny, tiny_calibration[:1], ("logit_std",), progress=False)
    with pytest.raises(
        gl.errors.InputError, match="no stage='projected': expected stage='rotated'"
    ):
        gains.score("logit_std", stage="projected")


@pytest.mark.parametrize("score", ["qk", "logit_std", "fisher"])
def test_gauge(score):
    """Key pair times 50, query pair times 1/50: the model is the same, so is the score."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = "LlamaForCausalLM"
    hf = hugging_face(name)
    attention = hf.model.layers[1].self_attn
    dims = torch.tensor([3, 11])  # pair 3 of head size 16
    with torch.no_grad():
        attention.k_proj.weight[dims] *= 50.0
        attention.q_proj.weight[dims] /= 50.0
        attention.q_proj.weight[16 + dims] /= 50.0
    moved = build_bridge_from_module(hf, name, hf_config=hf.config)
    tokens = family_tokens()
    both = [
        gl.probe_gains(m, tokens, ("rms", score), progress=False) for m in (bridge(name), moved)
    ]
    for unit in ("dim", "pair"):
        a, b = (g.score(score, unit=unit) for g in both)
        assert torch.allclose(a, b, rtol=2e-3, atol=1e-7)
        # The descriptive score does move, so the test can fail.
        c, d = (g.score("rms", unit=unit) for g in both)
        assert d[1, 0, 3] > 40 * c[1, 0, 3]


def test_save_and_load_costly_scores(tiny, tiny_calibration, tmp_path):
    gains = gl.probe_gains(tiny, tiny_calibration[:2], ("logit_std", "fisher"), progress=False)
    gains.save(tmp_path / "g.safetensors")
    again = gl.KeyGains.load(tmp_path / "g.safetensors")
    for score in ("logit_std", "fisher"):
        assert torch.equal(again.score(score), gains.score(score))


@pytest.mark.parametrize("bias", [30.0, 300.0])
def test_a_large_constant_in_the_keys_is_not_taken_for_spread(bias):
    """Qwen2's key biases reach hundreds; the difference of float32 squares would drown in them."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 12, 2, 4, generator=generator)
    queries = torch.randn(2, 12, 4, 4, generator=generator)
    pattern = torch.rand(2, 4, 12, 12, generator=generator).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    partner = torch.tensor([2, 3, 0, 1])
    wanted = logit_spread(queries.double(), keys.double(), pattern.double(), partner)
    got = logit_spread(queries, keys + bias, pattern, partner)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_pattern_hook_that_stays_silent_is_an_error(tiny, tiny_calibration):
    """Its sums would be zero, and every unit the quietest."""
    from gainlens.model.hooks import hook_point

    with (
        pytest.raises(gl.errors.SilentSiteError, match="hook_pattern"),
        gl.KeyGainProbe(tiny, ("logit_std",)) as probe,
    ):
        hook_point(tiny, "blocks.1.attn.hook_pattern").remove_hooks()
        with torch.inference_mode():
            tiny(tiny_calibration[:1, :16])
    with pytest.raises(gl.errors.SilentSiteError, match="hook_pattern"):
        probe.gains()
