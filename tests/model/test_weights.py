"""Reading and writing attention weights, what a fingerprint sees, and bridges that are wrong."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import ALL_FAMILIES, FAMILIES, bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.model.attention_layouts import (
    LAYOUTS,
    bridge_weights,
    layer_tensors,
    plain_tensors,
)
from gainlens.model.families import FAMILIES as KNOWN
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.hooks import attached

FALCON = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, alibi=False
)
MORE = {
    "falcon, grouped": (
        "FalconForCausalLM",
        transformers.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    ),
    "falcon, a key head each": (
        "FalconForCausalLM",
        transformers.FalconConfig(**FALCON, multi_query=False),
    ),
    "bloom": (
        "BloomForCausalLM",
        transformers.BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=64),
    ),
    "mpt": (
        "MptForCausalLM",
        transformers.MptConfig(d_model=48, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=64),
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        transformers.GPTNeoConfig(
            hidden_size=48, num_layers=2, num_heads=4, vocab_size=64, max_position_embeddings=64,
            attention_types=[[["global"], 2]],
        ),
    ),
}  # fmt: skip


def small(name):
    if name in ALL_FAMILIES:
        return name, hugging_face(name)
    architecture, config = MORE[name]
    torch.manual_seed(0)
    config.architectures = [architecture]
    return architecture, getattr(transformers, architecture)(config).eval()


def test_every_family_has_a_layout():
    assert set(KNOWN) == set(LAYOUTS)


@pytest.mark.parametrize("name", [*ALL_FAMILIES, *MORE])
def test_what_is_read_is_what_is_written(name):
    architecture, model = small(name)
    layout = LAYOUTS[architecture]
    module = model.get_submodule(layout.attention.format(1))
    tensors = {n: p.detach() for n, p in module.named_parameters()}
    weights = layout.read(tensors, model.config)
    n, kv, d = layout.sizes(model.config)
    assert weights.q.shape[:2] == (n, d)
    assert weights.k.shape[:2] == weights.v.shape[:2] == (kv, d)
    blank = {name: torch.zeros_like(t) for name, t in tensors.items()}
    again = layout.write(blank, weights, model.config)
    for part in (*layout.parts, layout.output):
        for leaf in ("weight", "bias"):
            if f"{part}.{leaf}" in tensors:
                assert torch.equal(again[f"{part}.{leaf}"], tensors[f"{part}.{leaf}"])


@pytest.mark.parametrize("name", [*FAMILIES, "falcon, a key head each", "bloom", "gpt-neo"])
def test_weights_give_the_keys_that_the_model_has(name):
    """x Wᵀ + b of the read weights is hook_k, x being what the attention reads."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture, model = small(name)
    layout, config = LAYOUTS[architecture], model.config
    path = layout.attention.format(1)
    seen = {}
    own = layout.read(
        {n: p.detach() for n, p in model.get_submodule(path).named_parameters()}, config
    )
    made = build_bridge_from_module(model, architecture, hf_config=config)
    hooks = [
        (f"blocks.1.attn.hook_{x}", lambda t, hook, x=x: seen.update({x: t.clone()})) for x in "qk"
    ]
    catch = made.blocks[1].attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    with torch.inference_mode(), attached(made, hooks):
        made(family_tokens())
    catch.remove()
    tensors = plain_tensors(made.original_model)
    from_bridge = bridge_weights(made, layout, config, 1, tensors)
    assert layer_tensors(tensors, layout, 1)
    for weights in (own, from_bridge):
        for letter in "qk":
            got = torch.einsum("bpm,hdm->bphd", seen["x"], getattr(weights, letter))
            bias = getattr(weights, f"{letter}_bias")
            got = got if bias is None else got + bias
            assert torch.allclose(got, seen[letter].reshape(got.shape), atol=1e-3), letter


@pytest.mark.parametrize("name", FAMILIES)
def test_one_fingerprint_for_a_bridge_and_its_model(name):
    assert model_fingerprint(bridge(name)) == model_fingerprint(hugging_face(name))


def wrapped(name, model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, name, hf_config=model.config)


CHANGES = {
    "a bias": ("Qwen2ForCausalLM", "model.layers.1.self_attn.k_proj.bias"),
    "a norm on keys": ("Qwen3ForCausalLM", "model.layers.1.self_attn.k_norm.weight"),
    "a norm over all keys": ("Olmo2ForCausalLM", "model.layers.0.self_attn.k_norm.weight"),
    "the input's norm": ("LlamaForCausalLM", "model.layers.1.input_layernorm.weight"),
    "the input's norm, offset": ("Gemma3ForCausalLM", "model.layers.1.input_layernorm.weight"),
    "an MLP": ("LlamaForCausalLM", "model.layers.0.mlp.up_proj.weight"),
    "a joint MLP": ("Phi3ForCausalLM", "model.layers.0.mlp.gate_up_proj.weight"),
    "a joint bias": ("GPTNeoXForCausalLM", "gpt_neox.layers.1.attention.query_key_value.bias"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_sees(what):
    name, parameter = CHANGES[what]
    model = hugging_face(name)
    wanted = model_fingerprint(model)
    with torch.no_grad():
        model.get_parameter(parameter).flatten()[3] += 0.01
    changed = model_fingerprint(model)
    assert changed != wanted
    assert model_fingerprint(wrapped(name, model)) == changed


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, its parts named as PEFT names them."""

    def __init__(self, base, size):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, 2, False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, base.out_features, False)})
        with torch.no_grad():
            for matrix in (self.lora_A, self.lora_B):
                matrix["default"].weight.fill_(size)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(size):
    model = hugging_face("LlamaForCausalLM")
    for layer in model.model.layers:
        layer.self_attn.k_proj = Adapted(layer.self_attn.k_proj, size)
    return model


def test_a_fingerprint_sees_adapters():
    bare = model_fingerprint(hugging_face("LlamaForCausalLM"))
    some = model_fingerprint(adapted(0.3))
    assert some not in (bare, model_fingerprint(adapted(0.4)))
    made = wrapped("LlamaForCausalLM", adapted(0.3))
    assert model_fingerprint(made) == some
    tokens = family_tokens(12, 12)
    gains = gl.probe_gains(made, tokens[:6], progress=False)
    with pytest.raises(gl.errors.InputError, match="other weights"):
        gl.surgery(bridge("LlamaForCausalLM"), tokens[6:], gains, fractions=(0.5,), progress=False)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("multi_query", [True, False])
def test_a_bridge_of_falcon_is_its_model_or_is_refused(multi_query, kv):
    """TransformerLens knows Falcon's older layouts; of the newer one some happen to be the same."""
    config = transformers.FalconConfig(
        **FALCON, new_decoder_architecture=True, multi_query=multi_query, num_kv_heads=kv
    )
    config.architectures = ["FalconForCausalLM"]
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.2 / parameter.std())
    with torch.inference_mode():
        wanted = model(family_tokens()).logits
    try:
        made = wrapped("FalconForCausalLM", model)
        with torch.inference_mode():
            got = made(family_tokens())
    except (RuntimeError, AttributeError):
        return  # not wrapped, and it says so
    if torch.allclose(got, wanted, atol=1e-3 * float(wanted.abs().max())):
        assert key_sites(made).n_kv_heads == kv
    else:
        with pytest.raises(gl.errors.UnsupportedModelError):
            key_sites(made)


def test_parts_of_a_joint_matrix_may_have_been_trained():
    """A bridge trains its own parts of a joint matrix; the matrix beside them is then stale."""
    made = wrapped("GPTNeoXForCausalLM", hugging_face("GPTNeoXForCausalLM"))
    attention = made.blocks[1].attn
    with torch.no_grad():
        attention.k.weight.mul_(1.3)
    assert key_sites(made).rotary_dim == 6
    assert model_fingerprint(made) != model_fingerprint(hugging_face("GPTNeoXForCausalLM"))


def dead_pairs(name, pairs, layers=(0, 1)):
    model = hugging_face(name)
    half = model.config.head_dim // 2
    with torch.no_grad():
        for layer in layers:
            for norm in ("q_norm", "k_norm"):
                weight = getattr(model.model.layers[layer].self_attn, norm).weight
                offset = -1.0 if name.startswith("Gemma") else 0.0
                for pair in pairs:
                    weight[pair] = weight[pair + half] = offset
    return wrapped(name, model)


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("layers", [(0,), (0, 1)])
@pytest.mark.parametrize("pairs", [(2,), (0, 7), (1, 3, 5, 6, 7)])
def test_dead_pairs_turn_as_the_others_do(name, layers, pairs):
    sites = key_sites(dead_pairs(name, pairs, layers))
    wanted = key_sites(bridge(name))
    assert (sites.pairing, sites.rotary_dim) == ("half", 16)
    assert torch.allclose(sites.frequencies, wanted.frequencies, rtol=1e-4)


def test_two_rotary_bases_have_a_wavelength_per_layer():
    from gainlens.analysis.map.units import unit_gains

    arguments = {**ALL_FAMILIES["Gemma3ForCausalLM"][1], "num_hidden_layers": 6}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**arguments)
    made = wrapped("Gemma3ForCausalLM", transformers.Gemma3ForCausalLM(config).eval())
    gains = gl.probe_gains(made, family_tokens(), progress=False)
    units = unit_gains(gains, "rms", "rotated")[1]
    for layer, base in ((0, 1e4), (5, 1e6)):
        wanted = [2 * torch.pi * base ** (2 * i / 16) for i in range(8)]
        assert units.wavelengths(layer) == pytest.approx(wanted, rel=1e-3)
    assert units.wavelength[0] == pytest.approx(2 * torch.pi, rel=1e-3)
    assert units.wavelength[1:] == [None] * 7
    slow = [1e4 ** (-2 * i / 16) for i in range(8)]
    assert units.layer_frequency[0] == pytest.approx(slow, rel=1e-3)
