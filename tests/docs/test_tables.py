"""Every row of every table that CONTRIBUTING names is tested by being listed there."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import ALL_FAMILIES as ALL_SMALL_MODELS
from families import bridge, family_tokens, hugging_face

import gainlens as gl
from gainlens.ablation.modes import MODES
from gainlens.export import ENGINES, SlicePlan, slim
from gainlens.export.families import FAMILIES as SLIM_FAMILIES
from gainlens.model.families import FAMILIES
from gainlens.probes.scores import SCORES

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))


@pytest.mark.one_env
def test_every_family_has_a_small_model():
    assert set(FAMILIES) == set(ALL_SMALL_MODELS)


@pytest.mark.one_env
def test_every_slim_family_has_a_small_model():
    from slim_families import CONFIGS

    there = {type(make()).__name__ for make, _ in CONFIGS.values()}
    assert {family.config_class for family in SLIM_FAMILIES.values()} <= there


def gauge_moved():
    """A Llama whose pair 3 has keys 50 times as large and queries 1/50: the same function."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = "LlamaForCausalLM"
    hf = hugging_face(name)
    attention = hf.model.layers[1].self_attn
    dims = torch.tensor([3, 11])
    with torch.no_grad():
        attention.k_proj.weight[dims] *= 50.0
        attention.q_proj.weight[dims] /= 50.0
        attention.q_proj.weight[16 + dims] /= 50.0
    return build_bridge_from_module(hf, name, hf_config=hf.config)


@pytest.mark.parametrize("name", SCORES)
def test_gain(name, tmp_path):
    model, tokens = bridge("LlamaForCausalLM"), family_tokens()
    gains = gl.probe_gains(model, tokens, (name,), progress=False)
    parts = [gl.probe_gains(model, half, (name,), progress=False) for half in tokens.split(2)]
    merged = sum(parts[1:], parts[0])
    gains.save(tmp_path / "gains.safetensors")
    read = gl.KeyGains.load(tmp_path / "gains.safetensors")
    moved = gl.probe_gains(gauge_moved(), tokens, (name,), progress=False)
    for unit in ("dim", "pair"):
        score = gains.score(name, unit=unit)
        assert score.dtype == torch.float32
        assert score.shape == gains.shape
        assert torch.isfinite(score).all()
        assert score.min() >= 0
        assert score.std() > 0
        assert torch.equal(read.score(name, unit=unit), score)
        assert torch.allclose(merged.score(name, unit=unit), score, rtol=1e-3, atol=1e-7)
        same = torch.allclose(moved.score(name, unit=unit), score, rtol=2e-3, atol=1e-7)
        assert same == SCORES[name].gauge_invariant
    pair = gains.score(name, unit="pair")
    assert torch.equal(pair, pair[..., gains.model.partner])
    assert SCORES[name].formula


@pytest.mark.parametrize("name", MODES)
def test_mode(name):
    model, tokens = bridge("LlamaForCausalLM"), family_tokens()
    gains = gl.probe_gains(model, tokens, progress=False)
    context = {"gains": gains, "cache": gl.ablation.KeyCache.run(model, tokens.flip(0)), "seed": 1}
    mask = gl.KeyMask.quietest(gains, 0.5)
    nothing = gl.KeyMask(torch.ones(gains.shape, dtype=torch.bool))

    def run(mask, stage="rotated"):
        if stage == "projected":
            here = context | {"cache": gl.ablation.KeyCache.run(model, tokens.flip(0), stage)}
        else:
            here = context
        with torch.inference_mode(), gl.ablate(model, mask, name, stage=stage, **here):
            return model(tokens, return_type="logits")

    with torch.inference_mode():
        intact = model(tokens, return_type="logits")
        hooks = gl.ablation_hooks(model, mask, name, **context)
        hooked = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    assert torch.allclose(run(nothing), intact, atol=1e-5)
    assert (run(mask) - intact).abs().max() > 1e-2
    assert torch.allclose(run(mask), hooked, atol=1e-5)
    if MODES[name].commutes:
        assert torch.allclose(run(mask), run(mask, "projected"), atol=1e-4)
    assert MODES[name].meaning


@pytest.mark.one_env
@pytest.mark.parametrize("name", [n for n in MODES if n != "patch"])
def test_surgery_takes_the_mode(name, tiny, tiny_validation, tiny_gains):
    curves = [
        gl.surgery(tiny, tiny_validation, tiny_gains, (0.5,), mode=name, orders=("quietest",),
                   fast=fast, progress=False)
        for fast in (True, False)
    ]  # fmt: skip
    assert curves[0].losses == pytest.approx(curves[1].losses, abs=1e-5)


@pytest.fixture(scope="module")
def thin():
    """A slim Llama whose 32 key and value dimensions every engine takes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
    )
    hf = transformers.LlamaForCausalLM(config).eval()
    keep = torch.zeros(2, 1, 64, dtype=torch.bool)
    keep[..., 5:21] = keep[..., 37:53] = True
    tokens = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(5))
    return slim(hf, SlicePlan(keep, (32, 32)), tokens)


@pytest.mark.one_env
@pytest.mark.parametrize("name", ENGINES)
def test_engine(name, thin, tmp_path):
    engine = ENGINES[name]
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        wanted = thin(tokens, use_cache=False).logits
    for precision in engine.precisions:
        folder = gl.export_model(thin, tmp_path / precision, name, precision=precision)
        got = engine.logits(folder, [tokens])[0]
        # Rounding to half or to eight bits moves logits by no more than some per cent.
        allowed = 1e-4 if precision == "f32" else 0.1
        assert float((got - wanted).norm() / wanted.norm()) < allowed
    spoiled = copy.deepcopy(thin)
    with torch.no_grad():
        spoiled.model.layers[0].self_attn.k_proj.weight.mul_(3.0)
    other = engine.logits(gl.export_model(spoiled, tmp_path / "other", name), [tokens])[0]
    assert float((other - wanted).norm() / wanted.norm()) > 1e-3
