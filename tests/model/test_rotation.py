"""The rotation that gainlens does itself, against keys edited in transformers' own attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import (
    ALL_FAMILIES,
    COMMON,
    MISROTATED,
    NO_GROUPS,
    bridge,
    family_tokens,
    hugging_face,
)
from oracle_rotation import edited_keys
from releases import HAS_HOOKED

import gainlens as gl
from gainlens.ablation.refit_cut import RefitCut
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import attached

PHI3 = COMMON | {"pad_token_id": 0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def long_rope(n_pairs, **more):
    return (
        LONG
        | more
        | {
            "short_factor": [1.0 + 0.1 * i for i in range(n_pairs)],
            "long_factor": [2.0 + 0.7 * i for i in range(n_pairs)],
        }
    )


ROPES = {
    "longrope": ("Phi3ForCausalLM", "Phi3Config", PHI3, long_rope(6)),
    "longrope, partial": (
        "Phi3ForCausalLM",
        "Phi3Config",
        PHI3 | {"hidden_size": 64},
        long_rope(6, partial_rotary_factor=0.75),
    ),
    "yarn": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NO_GROUPS, YARN),
    "dynamic": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NO_GROUPS | {"max_position_embeddings": 24},
        DYNAMIC,
    ),
}


def pair_of_models(architecture, config_class=None, arguments=None, rope=None):
    """A bridge, and the transformers model that it was made from, untouched."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if rope is None:
        return bridge(architecture), hugging_face(architecture)

    def build():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**arguments, rope_parameters=rope)
        config.architectures = [architecture]
        model = getattr(transformers, architecture)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(0.2 / parameter.std())
        return model

    made = build()
    return build_bridge_from_module(made, architecture, hf_config=made.config), build()


def split_mask(sites, seed=0):
    """Single dimensions, so that no pair is whole."""
    generator = torch.Generator().manual_seed(seed)
    return gl.KeyMask(torch.rand(sites.shape, generator=generator) > 0.4)


def zeroed(mask):
    return lambda key, layer: key * mask.keep[layer][None, :, None]


def oracle(original, tokens, mask, **inputs):
    with torch.inference_mode(), edited_keys(original, zeroed(mask)):
        return original(tokens, **inputs).logits


@pytest.mark.parametrize("length", [12, 48])
@pytest.mark.parametrize("name", ROPES)
def test_a_cut_after_a_scaled_rotation(name, length):
    """Attention scales (longrope, yarn), and frequencies that change past the trained length."""
    model, original = pair_of_models(*ROPES[name])
    tokens = family_tokens(2, length)
    mask = split_mask(key_sites(model))
    assert not key_sites(model).rotated_fires
    with torch.inference_mode(), gl.ablate(model, mask):
        got = model(tokens)
    wanted = oracle(original, tokens, mask)
    with torch.inference_mode():
        intact = original(tokens).logits
    assert (intact - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert (got - wanted).abs().max() < 2e-4 * wanted.abs().max()


@pytest.mark.parametrize("length", [12, 48])
@pytest.mark.parametrize("name", ROPES)
def test_gains_after_a_scaled_rotation(name, length):
    model, original = pair_of_models(*ROPES[name])
    model.cfg.n_ctx = 64  # the user who goes beyond the trained length says so
    tokens = family_tokens(2, length)
    seen = {}

    def keep(key, layer):
        seen[layer] = key.double()
        return key

    with torch.inference_mode(), edited_keys(original, keep):
        original(tokens)
    wanted = torch.stack([seen[layer].square().mean((0, 2)).sqrt() for layer in sorted(seen)])
    gains = gl.probe_gains(model, tokens, ("rms",), progress=False)
    assert torch.allclose(gains.score("rms", stage="rotated").double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_generation_with_a_cache(name):
    model, original = pair_of_models(name)
    prompt = family_tokens(1, 6)
    mask = split_mask(key_sites(model))
    with torch.inference_mode(), edited_keys(original, zeroed(mask)):
        wanted = original.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    with torch.inference_mode(), gl.ablate(model, mask):
        got = model.original_model.generate(
            prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, use_cache=True
        )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_left_padding(name):
    model, original = pair_of_models(name)
    tokens = family_tokens(2, 10)
    padding = torch.ones_like(tokens)
    padding[1, :4] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    mask = split_mask(key_sites(model))
    inputs = {"attention_mask": padding, "position_ids": positions}
    wanted = oracle(original, tokens, mask, **inputs)
    with torch.inference_mode(), gl.ablate(model, mask):
        got = model.original_model(tokens, **inputs).logits
    assert (got - wanted)[padding.bool()].abs().max() < 2e-4 * wanted.abs().max()


def test_keys_of_a_run_past_the_trained_length():
    model, original = pair_of_models(*ROPES["longrope"])
    tokens = family_tokens(2, 48)
    seen = {}

    def keep(key, layer):
        seen[layer] = key.transpose(1, 2).clone()
        return key

    with torch.inference_mode(), edited_keys(original, keep):
        original(tokens)
    from gainlens.ablation.key_cache import KeyCache

    cache = KeyCache.run(model, tokens)
    for layer, keys in enumerate(cache.keys):
        assert torch.allclose(keys, seen[layer], atol=1e-5 * float(keys.abs().max()) + 1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GlmForCausalLM", "Qwen3ForCausalLM"])
def test_refitted_maps_follow_a_cache(name):
    """Where hook_rot_k fires, keys are turned back, mapped and turned again: at their positions."""
    model, sites = bridge(name), key_sites(bridge(name))
    torch.manual_seed(1)
    d = sites.d_head
    query_maps = torch.eye(d) + 0.3 * torch.randn(sites.n_layers, sites.n_heads, d, d)
    key_maps = torch.eye(d) + 0.3 * torch.randn(sites.n_layers, sites.n_kv_heads, d, d)
    cut = RefitCut(gl.KeyMask(torch.ones(sites.shape, dtype=torch.bool)), query_maps, key_maps)
    tokens = family_tokens(2, 10)
    with torch.inference_mode(), attached(model, cut.hooks(model)):
        whole = model.original_model(tokens).logits
        first = model.original_model(tokens[:, :7], use_cache=True)
        rest = model.original_model(tokens[:, 7:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 7:], atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("length", [12, 48])
def test_the_fast_copy_turns_as_the_hooks_do(length):
    """A refitted cut of Llama with longrope, on both sides of the trained length."""
    from gainlens.model.fast_copy import build_fast_copy

    model, _ = pair_of_models(
        "LlamaForCausalLM", "LlamaConfig", COMMON | {"head_dim": 16}, long_rope(8)
    )
    sites = key_sites(model)
    torch.manual_seed(1)
    d = sites.d_head
    cut = RefitCut(
        gl.KeyMask(torch.ones(sites.shape, dtype=torch.bool)),
        torch.eye(d) + 0.3 * torch.randn(sites.n_layers, sites.n_heads, d, d),
        torch.eye(d) + 0.3 * torch.randn(sites.n_layers, sites.n_kv_heads, d, d),
    )
    tokens = family_tokens(2, length)
    fast = build_fast_copy(model)
    with torch.inference_mode():
        with attached(model, cut.hooks(model)):
            wanted = model(tokens)
        with fast.edited(cut.edit(model, tokens)):
            got = fast.logits(fast.hidden(tokens))
    assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_no_hook_of_ours_stays():
    model, _ = pair_of_models(*ROPES["yarn"])
    with torch.inference_mode():
        model(family_tokens(1, 8))  # in which TransformerLens sets hooks of its own
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    with torch.inference_mode(), gl.ablate(model, split_mask(key_sites(model))):
        model(family_tokens(1, 8))
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_every_family_says_its_logit_scale():
    """Against the scale that each architecture's own attention is called with."""
    for name in ALL_FAMILIES:
        if name in ("GPTJForCausalLM", "CohereForCausalLM", *MISROTATED):
            continue
        original = hugging_face(name)
        found = [
            float(m.scaling)
            for m in original.modules()
            if isinstance(getattr(m, "scaling", None), float)
        ]
        if found:
            assert key_sites(bridge(name)).logit_scale == pytest.approx(found), name


def test_pairs_that_hardly_turn_count_as_rotating():
    """GPT-J's slowest pair turns by 0.00013 a token, below what six tokens show."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        n_embd=128, n_layer=2, n_head=2, rotary_dim=64, vocab_size=64, n_positions=64
    )
    config.architectures = ["GPTJForCausalLM"]
    model = transformers.GPTJForCausalLM(config).eval()
    sites = key_sites(build_bridge_from_module(model, "GPTJForCausalLM", hf_config=config))
    assert (sites.pairing, sites.rotary_dim) == ("adjacent", 64)
    wanted = 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    assert torch.allclose(sites.frequencies.double(), wanted.expand(2, -1), rtol=1e-4)


def test_a_length_dependent_rotation_that_can_not_be_read_is_refused():
    """Without the model's own cosines, frequencies measured on short text don't hold."""
    from dataclasses import replace

    model, _ = pair_of_models(*ROPES["dynamic"])
    rotation = key_sites(model).rotation
    assert not rotation.plain
    blind = replace(rotation, layout=None)
    with pytest.raises(gl.errors.UnsupportedModelError, match="rope_type"):
        blind.turn(0, 12)
    following = blind.follow()
    following.given[0] = {"position_ids": torch.arange(12)[None]}
    with pytest.raises(gl.errors.UnsupportedModelError, match="rope_type"):
        following.turn("k", 0, 12)


@pytest.mark.skipif(not HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_refitted_maps_follow_a_cache_of_a_hooked_transformer():
    """It caches unrotated keys and turns all of them in every pass."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model = gl.load_model("tiny", kind="hooked")
    sites = key_sites(model)
    assert sites.rotation.layout == "halves"
    torch.manual_seed(1)
    d = sites.d_head
    cut = RefitCut(
        gl.KeyMask(torch.ones(sites.shape, dtype=torch.bool)),
        torch.eye(d) + 0.2 * torch.randn(sites.n_layers, sites.n_heads, d, d),
        torch.eye(d) + 0.2 * torch.randn(sites.n_layers, sites.n_kv_heads, d, d),
    )
    tokens = family_tokens(2, 10)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    with torch.inference_mode(), attached(model, cut.hooks(model)):
        whole = model(tokens)
        model(tokens[:, :7], past_kv_cache=cache)
        rest = model(tokens[:, 7:], past_kv_cache=cache)
    assert torch.allclose(rest, whole[:, 7:], atol=1e-4 * float(whole.abs().max()))
