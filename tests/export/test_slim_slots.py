"""A slim model whose slots have frequencies of their own, against the hooked cut."""

from __future__ import annotations

import copy

import pytest
import torch
from slim_families import CONFIGS, random_model

import gainlens as gl
from gainlens.ablation import SlotCut
from gainlens.errors import FileFormatError, InputError
from gainlens.export import plan_of
from gainlens.export.engines.stock import longrope_factors, stock_llama
from gainlens.export.plan import SlicePlan
from gainlens.export.recipe import refitted
from gainlens.files import sealed
from gainlens.model.wrapping import to_bridge

TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))


def random_slots(hf, shared, zero=False):
    """Random maps into the first half of the pairs; frequencies of one set, or of each head."""
    config = hf.config
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    generator = torch.Generator().manual_seed(7)
    keep = torch.zeros(config.num_hidden_layers, n_kv, d, dtype=torch.bool)
    keep[..., : d // 4] = keep[..., d // 2 : d // 2 + d // 4] = True
    f = torch.rand(*keep.shape[:2], d // 2, generator=generator, dtype=torch.float64)
    if zero:
        f[..., 0] = 0.0
    if shared:
        f = f[:1, :1].expand(f.shape).clone()

    def maps(kept):
        noise = 0.3 * torch.randn(*kept.shape, d, generator=generator)
        return (torch.eye(d) + noise) * kept[..., None]

    bridge = to_bridge(copy.deepcopy(hf), "x", None)
    own = gl.model.key_sites(bridge).frequencies
    q = maps(keep.repeat_interleave(n_heads // n_kv, 1))
    return bridge, SlotCut(gl.KeyMask(keep), q, maps(keep), f, own)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("shared", [True, False], ids=["universal", "per head"])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama-yarn", "mistral", "qwen2"])
def test_slim_computes_what_the_hooked_cut_does(name, shared, tmp_path):
    hf = random_model(name)
    bridge, cut = random_slots(hf, shared)
    with torch.no_grad():
        wanted = bridge.run_with_hooks(TOKENS, fwd_hooks=cut.hooks(bridge))
        intact = bridge(TOKENS)
    thin = gl.slim(hf, cut)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(gl.slim(bridge, cut)), wanted, atol=1e-4, rtol=0)
    assert (wanted - intact).abs().max() > 0.05
    plain = gl.slim(hf, gl.ablation.RefitCut(cut.mask, cut.query_maps, cut.key_maps))
    assert (wanted - logits(plain)).abs().max() > 0.01  # the frequencies matter
    thin.save_pretrained(tmp_path)
    again = gl.load_slim(tmp_path)
    torch.testing.assert_close(logits(again), logits(thin), atol=1e-6, rtol=0)
    frequencies = plan_of(again.config).frequencies
    assert torch.equal(frequencies, cut.frequencies)
    half = copy.deepcopy(thin).to(torch.bfloat16)
    assert torch.equal(half.base_model.rotary_emb.inv_freq, thin.base_model.rotary_emb.inv_freq)


def test_a_cache_goes_on_where_it_was():
    hf = random_model("llama")
    _, cut = random_slots(hf, False)
    thin = gl.slim(hf, cut)
    whole = logits(thin)
    with torch.no_grad():
        first = thin(TOKENS[:, :30], use_cache=True)
        rest = thin(TOKENS[:, 30:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 30:], atol=1e-4, rtol=0)


def test_slots_of_a_real_model(tiny, tiny_gains, tiny_calibration, tiny_validation):
    from gainlens.ablation import fit_slots

    cut = fit_slots(
        tiny, tiny_calibration, tiny_gains, score="qk", rounds=1, iterations=2, progress=False
    )
    thin = gl.slim(tiny, cut)
    with torch.no_grad():
        wanted = tiny.run_with_hooks(tiny_validation, fwd_hooks=cut.hooks(tiny))
    torch.testing.assert_close(logits(thin, tiny_validation), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("zero", [False, True])
def test_stock_llama_takes_a_shared_set(zero):
    """Transformers' own Llama, longrope factors and all, knows nothing of slots."""
    hf = random_model("llama")
    _, cut = random_slots(hf, True, zero)
    thin = gl.slim(hf, SlicePlan.from_cut(cut, values=8), TOKENS)
    stock = stock_llama(thin)
    torch.testing.assert_close(logits(stock), logits(thin), atol=1e-4, rtol=0)
    assert torch.isfinite(torch.tensor(longrope_factors(thin)[1])).all()


def test_plans_with_frequencies(tmp_path):
    _, shared = random_slots(random_model("llama"), True)
    _, own = random_slots(random_model("llama"), False)
    one, many = SlicePlan.from_cut(shared), SlicePlan.from_cut(own)
    assert one.shared
    assert not many.shared
    assert one != SlicePlan(one.keep)
    assert len(one.to_json()["frequencies"]) == len(one.to_json()["frequencies"][0]) == 1
    for plan in (one, many):
        bare = SlicePlan(plan.keep, frequencies=plan.frequencies)
        bare.save(tmp_path / "plan.json")
        assert SlicePlan.load(tmp_path / "plan.json") == bare
    assert many.nearest_shared(16).frequencies is None
    value = one.to_json()
    for bad in ([[["x"]]], "fast", [[1.0]], [[[1.0, 2.0]]], [[[-1.0] * 8]]):
        content = {k: v for k, v in value.items() if k not in ("checksum", "format", "kind")}
        with pytest.raises(FileFormatError, match="frequenc"):
            SlicePlan.from_json(sealed("slice_plan", {**content, "frequencies": bad}))


def test_what_can_not_take_slots():
    llama = random_model("llama")
    _, cut = random_slots(llama, True)
    bridge = to_bridge(copy.deepcopy(llama), "x", None)
    with pytest.raises(InputError, match="slot frequencies, and a refit keeps"):
        refitted(bridge, TOKENS, SlicePlan.from_cut(cut))
    assert CONFIGS["neox"][1] == 4
    neox = random_model("neox")
    keep = torch.ones(3, 4, 8, dtype=torch.bool)
    f = torch.rand(1, 1, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="4 dimensions rotate"):
        gl.slim(neox, SlicePlan(keep, frequencies=f))
