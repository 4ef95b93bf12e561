"""KeySites against what is known of each family, and against Hugging Face's own rotation."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES, MISROTATED, ROTARY, bridge, family_tokens, hugging_face
from oracle_rotation import rotate

import gainlens as gl
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import attached, hook_point
from gainlens.model.sites import pair_partners
from gainlens.model.verify import find_pairing, pairing_residual


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_of_every_family(name):
    _, _, pairing, rotary_dim, fires, norm = FAMILIES[name]
    sites = key_sites(bridge(name))
    assert sites.architecture == name
    assert (sites.pairing, sites.rotary_dim) == (pairing, rotary_dim)
    assert (sites.rotated_fires, sites.norm_after_projection) == (fires, norm)
    heads = bridge(name).cfg.n_heads
    assert sites.n_heads == heads
    assert sites.group_size * sites.n_kv_heads == heads
    assert sites.frequencies.shape == (sites.n_layers, rotary_dim // 2)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_measured_frequencies_are_the_declared_series(name):
    sites = key_sites(bridge(name))
    expected = 10000.0 ** (-torch.arange(0, sites.rotary_dim, 2).double() / sites.rotary_dim)
    assert torch.allclose(sites.frequencies.double(), expected.expand(2, -1), rtol=1e-4, atol=1e-6)


def test_gemma3_has_two_rotary_bases():
    config = transformers.Gemma3TextConfig(
        **{**FAMILIES["Gemma3ForCausalLM"][1], "num_hidden_layers": 6}
    )
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = transformers.Gemma3ForCausalLM(config).eval()
    sites = key_sites(build_bridge_from_module(model, "Gemma3ForCausalLM", hf_config=config))
    slowest = sites.frequencies[:, -1]
    assert slowest[5] < 0.1 * slowest[0]


@pytest.mark.parametrize("name", [n for n in ROTARY if FAMILIES[n][4]])
def test_our_rotation_is_the_models_own(name):
    """Turning hook_k with the measured frequencies gives hook_rot_k (norm in between aside)."""
    model, sites = bridge(name), key_sites(bridge(name))
    if sites.norm_after_projection:
        before = "blocks.1.attn.hook_k_normed"
        if hook_point(model, before) is None:
            pytest.fail(f"{name} has no hook after its norm to compare with")
    else:
        before = sites.key_hook(1, "projected")
    seen = {}
    hooks = [
        (before, lambda t, hook: seen.update(before=t.clone())),
        (sites.key_hook(1, "rotated"), lambda t, hook: seen.update(after=t.clone())),
    ]
    with torch.inference_mode(), attached(model, hooks):
        model(family_tokens())
    keys = seen["before"]
    if keys.ndim == 3:
        keys = keys.reshape(*keys.shape[:2], sites.n_kv_heads, sites.d_head)
    elif keys.shape[1] == sites.n_kv_heads and keys.shape[2] == 12:
        keys = keys.transpose(1, 2)
    turned = rotate(keys, sites.frequencies[1], sites.pairing)
    assert torch.allclose(turned, seen["after"], atol=2e-4 * float(keys.abs().max()))
    back = rotate(turned, sites.frequencies[1], sites.pairing, inverse=True)
    assert torch.allclose(back, keys, atol=1e-5 * float(keys.abs().max()))


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "Phi3ForCausalLM", "GPTJForCausalLM"])
def test_our_rotation_gives_the_attention_of_silent_families(name):
    """softmax(q·k) after our rotation is the model's own pattern where hook_rot_k is silent."""
    model, sites = bridge(name), key_sites(bridge(name))
    seen = {}
    hooks = [
        (f"blocks.1.attn.hook_{x}", lambda t, hook, x=x: seen.update({x: t.clone()}))
        for x in ("q", "k", "pattern")
    ]
    with torch.inference_mode(), attached(model, hooks):
        model(family_tokens())
    q, k = (rotate(seen[x], sites.frequencies[1], sites.pairing) for x in ("q", "k"))
    k = k.repeat_interleave(sites.group_size, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / sites.d_head**0.5
    causal = torch.tril(torch.ones(12, 12)).bool()
    pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    assert torch.allclose(pattern, seen["pattern"], atol=1e-4)
    assert float(pattern[..., 1:, :].std()) > 0.05


def test_a_model_that_rotates_wrongly_is_refused():
    """What a family declares is checked on the model: one release turns Cohere's keys wrongly."""
    for name in MISROTATED:
        original = hugging_face(name)
        with torch.inference_mode():
            error = (bridge(name)(family_tokens()) - original(family_tokens()).logits).abs().max()
        assert error > 0.1
        with pytest.raises(gl.errors.UnsupportedModelError, match="declared 'adjacent'"):
            key_sites(bridge(name))


def test_both_model_classes_have_the_same_sites(any_tiny):
    sites = key_sites(any_tiny)
    assert sites.shape == (4, 2, 32)
    assert (sites.pairing, sites.rotary_dim, sites.group_size) == ("half", 32, 2)
    assert sites.rotated_fires
    expected = 10000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    assert torch.allclose(sites.frequencies.double(), expected.expand(4, -1), rtol=1e-4, atol=1e-7)


def test_half_precision_is_recognised():
    model = hugging_face("GlmForCausalLM").to(torch.bfloat16)
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    sites = key_sites(build_bridge_from_module(model, "GlmForCausalLM", hf_config=model.config))
    assert (sites.pairing, sites.rotary_dim) == ("adjacent", 8)


@pytest.mark.one_env
@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_wrong_pairing_does_not_keep_norms(pairing):
    torch.manual_seed(0)
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    keys = rotate(torch.randn(1, 1, 2, 20).expand(3, 24, 2, 20), frequencies, pairing).double()
    other = "adjacent" if pairing == "half" else "half"
    assert pairing_residual(keys, pairing, 16) < 1e-4
    assert pairing_residual(keys, other, 16) > 1e-1
    assert find_pairing(keys, None, "x", 1e-3) == (pairing, 16)
    with pytest.raises(gl.errors.UnsupportedModelError, match="declared"):
        find_pairing(keys, other, "x", 1e-3)


@pytest.mark.one_env
def test_partners_are_an_involution():
    for pairing, width in [("half", 8), ("adjacent", 6), ("none", 0), ("half", 0)]:
        partner = pair_partners(9, width, pairing)
        assert torch.equal(partner[partner], torch.arange(9))


def test_refusals_say_why():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(gl.errors.UnsupportedModelError, match="not causal"):
        key_sites(build_bridge_from_module(model, "BertForMaskedLM", hf_config=config))
    config = transformers.MambaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(gl.errors.UnsupportedModelError, match="attention layer"):
        key_sites(build_bridge_from_module(model, "MambaForCausalLM", hf_config=config))
    with pytest.raises(gl.errors.InputError, match="not a TransformerLens model"):
        key_sites(torch.nn.Linear(2, 2))


def test_nan_weights_are_refused():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = hugging_face("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    broken = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    with pytest.raises(gl.errors.InputError, match="NaN"):
        key_sites(broken)


def test_factored_basis_is_refused():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = hugging_face("GPT2LMHeadModel")
    folded = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    folded.enable_compatibility_mode(refactor_factored_attn_matrices=True, disable_warnings=True)
    with pytest.raises(gl.errors.UnsupportedModelError, match="factored basis"):
        key_sites(folded)


def test_compatibility_mode_counts_every_token_once():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = hugging_face("LlamaForCausalLM")
    folded = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    folded.enable_compatibility_mode(disable_warnings=True)
    tokens = family_tokens()
    gains = gl.probe_gains(folded, tokens, progress=False)
    plain = gl.probe_gains(bridge("LlamaForCausalLM"), tokens, progress=False)
    assert gains.n_tokens == tokens.numel()
    assert torch.allclose(gains.score("rms"), plain.score("rms"), rtol=1e-3)
    assert gains.model.fingerprint != plain.model.fingerprint
