"""Rotation, padding and sharding of the plug-in, against the slim model itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gainlens_vllm.configs import family_of, plan_of
from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.plan import Layer, Plan
from gainlens_vllm.rotation import rotate, slot_frequencies
from gainlens_vllm.shards import heads_of_rank
from gainlens_vllm.widths import equal_widths, summary, thin_widths
from test_vllm_folder import _tested_vllm, read  # noqa: F401 (a fixture)

from gainlens.export import modeling

CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def plan_with(*widths, values=64):
    return Plan(tuple(Layer(w, values, None, False, False) for w in widths), None, "")


def rotary_of(slim, layer, positions):
    """Cosines and sines that the slim model hands to its attention."""
    base = slim.base_model
    if not hasattr(base, "rotary_emb"):
        return None
    x = torch.zeros(1, len(positions), 1)
    kinds = getattr(slim.config, "layer_types", None)
    if slim.config.model_type == "gainlens_gemma3_text":
        return base.rotary_emb(x, positions[None], kinds[layer])
    return base.rotary_emb(x, positions[None])


def attention(module, config, layer, family, plan, hidden, queries, keys):
    """One layer's attention over some heads, from slices of the module's weights."""
    group = len(queries) // len(keys)
    positions = torch.arange(hidden.shape[1])

    def project(name, heads, total):
        layer = getattr(module, f"{name}_proj")
        width = layer.weight.shape[0] // total
        rows = slice(heads.start * width, heads.stop * width)
        bias = None if layer.bias is None else layer.bias[rows]
        return torch.nn.functional.linear(hidden[0], layer.weight[rows], bias).unflatten(
            1, (len(heads), width)
        )

    q = project("q", queries, module.n_heads).unflatten(1, (len(keys), group))
    k = project("k", keys, module.n_kv_heads).unsqueeze(2)
    v = project("v", keys, module.n_kv_heads)
    if module.norm is not None:
        normed = []
        for x, weight in ((q, module.q_norm), (k, module.k_norm)):
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps)
            rows = (weight[keys.start : keys.stop] + family.norm_offset)[None, :, None]
            normed.append(x[..., : plan.layers[layer].key_width] * scale * rows)
        q, k = normed
    turning = slot_frequencies(plan, config, family.rotary_dim(config), layer)
    if turning is not None:
        frequencies, factor = turning
        if len(frequencies) > 1:
            frequencies = frequencies[list(keys)]
        q, k = (rotate(x, positions, frequencies, factor) for x in (q, k))
    logits = torch.einsum("tkgd,skd->kgts", q, k.squeeze(2)) * module.scaling
    distance = positions[:, None] - positions
    hidden_keys = distance < 0
    if module.sliding_window is not None:
        hidden_keys = hidden_keys | (distance >= module.sliding_window)
    weights = logits.masked_fill(hidden_keys, float("-inf")).softmax(-1)
    out = torch.einsum("kgts,skd->tkgd", weights, v).flatten(1)
    width = module.o_proj.weight.shape[1] // module.n_heads
    return out @ module.o_proj.weight[:, queries.start * width : queries.stop * width].T


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_of_tensor_parallel_add_up_to_the_slim_layer(served, size):
    """Frequencies, norms, scale and heads of every rank, against the slim model's own attention."""
    _, slim, folder = served
    config = read(folder)
    family, plan = family_of(config), plan_of(config)
    row = modeling.family_of(slim.config)
    for layer in range(len(plan.layers)):
        module = slim.get_submodule(row.attention.format(layer))
        hidden = torch.randn(1, 12, slim.config.hidden_size)
        positions = torch.arange(12)
        near = positions[:, None] - positions < (module.sliding_window or 99)
        mask = (torch.ones(12, 12, dtype=torch.bool).tril() & near)[None, None]
        with torch.no_grad():
            wanted = module(hidden, rotary_of(slim, layer, positions), mask)[0][0]
            ranks = [heads_of_rank(module.n_heads, module.n_kv_heads, size, r) for r in range(size)]
            parts = [
                attention(module, config, layer, family, plan, hidden, *heads) for heads in ranks
            ]
        got = sum(parts) + (0.0 if module.o_proj.bias is None else module.o_proj.bias)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_slots_turn_by_the_frequencies_of_the_plan(slots, size):
    slim, folder = slots
    config = read(folder)
    plan, family = plan_of(config), family_of(config)
    for layer, block in enumerate(slim.model.layers):
        module, hidden = block.self_attn, torch.randn(1, 9, 32)
        with torch.no_grad():
            wanted = module(hidden, rotary_of(slim, layer, torch.arange(9)))[0][0]
            parts = [
                attention(
                    module, config, layer, family, plan, hidden, *heads_of_rank(4, 2, size, r)
                )
                for r in range(size)
            ]
        torch.testing.assert_close(sum(parts), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.one_env
@pytest.mark.parametrize(("heads", "kv", "size"), [(9, 3, 3), (8, 2, 2), (8, 2, 4), (8, 1, 8)])
def test_every_query_head_is_on_one_rank_with_its_key_head(heads, kv, size):
    group, seen = heads // kv, []
    for rank in range(size):
        queries, keys = heads_of_rank(heads, kv, size, rank)
        seen += queries
        assert {q // group for q in queries} == set(keys)
    assert seen == list(range(heads))


@pytest.mark.one_env
@pytest.mark.parametrize(("heads", "kv", "size"), [(9, 3, 2), (6, 2, 3), (8, 8, 3)])
def test_heads_that_can_not_be_divided(heads, kv, size):
    with pytest.raises(SlimFolderError, match=f"tensor_parallel_size={size} does not divide"):
        heads_of_rank(heads, kv, size, 0)


@pytest.mark.one_env
def test_rotation_by_complex_numbers():
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    positions, frequencies = torch.tensor([0, 3, 7, 100, 2]), torch.rand(2, 4)
    wanted = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(
        1j * positions[:, None, None, None] * frequencies[None, :, None].double()
    )
    got = rotate(x, positions, frequencies, 0.5)
    torch.testing.assert_close(
        got, 0.5 * torch.cat([wanted.real, wanted.imag], -1), rtol=0, atol=2e-5
    )


@pytest.mark.one_env
def test_equal_widths_for_a_cpu():
    route = equal_widths(plan_with(34, 50, 64), 64, CPU)
    assert route.keys == route.values == (64, 64, 64)
    assert not route.thin
    assert route.share == 1
    assert "NOTHING IS SAVED" in summary(plan_with(34, 50, 64), route)
    half = equal_widths(plan_with(20, 32, values=32), 64, CPU)
    assert half.share == 0.5
    assert "0.500 of the cache" in summary(plan_with(20, 32, values=32), half)
    with pytest.raises(SlimFolderError, match="heads of 300 dimensions: .* takes 32, 64"):
        equal_widths(plan_with(300), 300, CPU)


@pytest.mark.one_env
def test_thin_widths_for_a_gpu():
    plan = plan_with(6, 34, 40, values=64)
    route = thin_widths(plan, 64)
    assert route.keys == (16, 40, 40)
    assert route.values == (64,) * 3
    assert route.thin
    assert route.share == (96 + 192) / (6 * 64)
    assert not thin_widths(plan_with(64, 64), 64).thin
    assert thin_widths(plan_with(16, values=16), 64).thin  # too narrow for vLLM's own


@pytest.mark.one_env
def test_zeros_behind_heads_change_nothing():
    q, k, v = (torch.randn(1, 2, 7, n, dtype=torch.float64) for n in (20, 20, 32))
    zeros = [torch.nn.functional.pad(x, (0, 64 - x.shape[-1])) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    got = attend(*zeros, is_causal=True, scale=0.125)[..., :32]
    torch.testing.assert_close(got, attend(q, k, v, is_causal=True, scale=0.125))


@pytest.mark.one_env
def test_yarn_scales_the_cosines():
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope
    )
    plan = SimpleNamespace(
        table=None, layers=(Layer(8, 8, torch.tensor([[0, 1, 2, 3]]), True, False),)
    )
    _, factor = slot_frequencies(plan, config, 8, 0)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert factor == rotary.attention_scaling != 1
