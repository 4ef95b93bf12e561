"""A slim model computes what the masked original computes, for every family and kind of model."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from slim_families import CONFIGS, NO_BRIDGE, MaskedCache, random_keep, shape_of

import gainlens as gl
from gainlens.errors import GainlensError, InputError, UnsupportedModelError
from gainlens.export import SlicePlan, load_slim, plan_of, slim
from gainlens.export.slim_attention import SlimAttention
from gainlens.model.wrapping import hooked_class, to_bridge, to_hooked

TOKENS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(5))
EVERY = pytest.mark.parametrize("name", list(CONFIGS))

try:
    hooked_class()
    HAS_HOOKED = True
except UnsupportedModelError:
    HAS_HOOKED = False


def logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def masked(bridge, keep):
    """The oracle: the original with the same units zeroed by ablation hooks."""
    with torch.no_grad():
        hooks = gl.ablation_hooks(bridge, gl.KeyMask(keep), mode="zero")
        return bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)


@EVERY
def test_slim_is_the_masked_original(originals, name):
    hf = copy.deepcopy(originals[name])
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    keep = random_keep(shape_of(hf), CONFIGS[name][1])
    from_hf = slim(hf, SlicePlan(keep))
    assert {k: torch.equal(v, before[k]) for k, v in hf.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    whole = logits(hf)
    wanted = logits(hf, past_key_values=MaskedCache(keep, hf.config), use_cache=True)
    if name in NO_BRIDGE:
        with pytest.raises(UnsupportedModelError, match=NO_BRIDGE[name]):
            to_bridge(hf, name, None)
        return
    bridge = to_bridge(hf, name, None)
    if name != "mpt-bounded":  # ablation refuses whatever follows the hook
        torch.testing.assert_close(masked(bridge, keep), wanted, atol=1e-4, rtol=0)
    from_bridge = slim(bridge, SlicePlan(keep))
    with torch.no_grad():
        assert torch.equal(bridge(TOKENS), bridge(TOKENS, return_type="logits"))
        torch.testing.assert_close(bridge(TOKENS), whole, atol=1e-4, rtol=0)
    for model in (from_hf, from_bridge):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    assert (wanted - whole).abs().max() > 0.05  # the cut does something


@EVERY
def test_identity_changes_nothing(originals, name):
    hf = originals[name]
    thin = slim(hf, SlicePlan.identity(hf))
    assert (logits(thin) - logits(hf)).abs().max() <= 1e-5
    exact = copy.deepcopy(hf).double()
    thin = slim(exact, SlicePlan.identity(exact))
    # Norms, and the softmax of families with their own, work in float32 whatever the weights' type.
    allowed = 1e-6 if hasattr(hf.config, "rms_norm_eps") or "cohere" in name else 1e-12
    if hf.config._attn_implementation == "eager":
        allowed = 1e-5
    assert (logits(thin) - logits(exact)).abs().max() <= allowed


def random_refit(hf, rotary_dim):
    """Maps with rows for the kept dimensions alone, near plain selection."""
    keep = random_keep(shape_of(hf), rotary_dim)
    group = hf.config.num_attention_heads // keep.shape[1]
    generator = torch.Generator().manual_seed(7)
    d = keep.shape[2]

    def maps(kept):
        noise = 0.2 * torch.randn(*kept.shape, d, generator=generator)
        return (torch.eye(d) + noise) * kept[..., None]

    return gl.ablation.RefitCut(
        gl.KeyMask(keep), maps(keep.repeat_interleave(group, 1)), maps(keep)
    )


@pytest.mark.parametrize(
    "name", ["llama", "llama-biased", "llama-yarn", "mistral", "qwen2", "neox", "gpt2"]
)
def test_a_refit_folds_into_the_projections(originals, name):
    hf = copy.deepcopy(originals[name])
    cut = random_refit(hf, CONFIGS[name][1])
    from_hf = slim(hf, cut)
    bridge = to_bridge(hf, name, None)
    with torch.no_grad():
        wanted = bridge.run_with_hooks(TOKENS, fwd_hooks=cut.hooks(bridge))
    plan = SlicePlan.from_mask(cut, values=shape_of(hf)[2])
    for model in (from_hf, slim(bridge, plan, TOKENS)):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    assert (wanted - logits(slim(bridge, SlicePlan(plan.keep)))).abs().max() > 0.05


def test_refits_that_do_not_belong(originals):
    hf = originals["llama"]
    cut = random_refit(hf, 16)
    stranger = gl.ablation.RefitCut(
        cut.mask, cut.query_maps, cut.key_maps, {"fingerprint": "ab" * 32}
    )
    with pytest.raises(InputError, match=r"another model \(weights abababababab\)"):
        slim(hf, stranger)
    with pytest.raises(InputError, match=r"query maps \(3, 4, 16, 16\): .* takes \(3, 4, 8, 8\)"):
        slim(originals["qwen2"], replace(SlicePlan.identity(originals["qwen2"]), maps=cut.maps))


def test_a_fitted_cut_of_a_real_model(tiny, tiny_gains, tiny_calibration, tiny_validation):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    cut = gl.ablation.refit(tiny, tiny_calibration, mask, rounds=1, progress=False)
    thin = slim(tiny, cut)
    with torch.no_grad():
        wanted = tiny.run_with_hooks(tiny_validation, fwd_hooks=cut.hooks(tiny))
    torch.testing.assert_close(logits(thin, tiny_validation), wanted, atol=1e-4, rtol=0)
    assert plan_of(thin.config).facts["refit"] == cut.facts


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "mistral", "qwen2", "neox", "gpt2"])
def test_what_is_left_in_float64_is_rounding(originals, name):
    """With keys and values cut; the norms of the Llama family round to float32 in any type."""
    hf = copy.deepcopy(originals[name]).double()
    keep = random_keep(shape_of(hf), CONFIGS[name][1])
    thin = slim(hf, SlicePlan(keep).with_values(0.5), TOKENS)
    assert thin.gainlens_parity.logits.dtype == torch.float64
    assert thin.gainlens_parity.difference <= (1e-12 if name in ("neox", "gpt2") else 2e-6)


@pytest.mark.skipif(not HAS_HOOKED, reason="needs transformer-lens 3.9")
@pytest.mark.parametrize("name", ["llama", "llama-3-rope", "qwen2", "qwen3"])
def test_slim_of_a_hooked_transformer(originals, name):
    hooked = to_hooked(copy.deepcopy(originals[name]), name, None)
    keep = random_keep(shape_of(originals[name]), CONFIGS[name][1])
    thin = slim(hooked, SlicePlan(keep))
    torch.testing.assert_close(logits(thin), masked(hooked, keep), atol=1e-4, rtol=0)


@pytest.mark.skipif(not HAS_HOOKED, reason="needs transformer-lens 3.9")
@pytest.mark.parametrize("family", ["gpt2", "neox"])
@pytest.mark.parametrize("fold", [False, True])
def test_slim_of_a_hooked_transformer_made_by_hand(family, fold):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    neox = {
        "original_architecture": "GPTNeoXForCausalLM",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_adjacent_pairs": False,
        "parallel_attn_mlp": True,
        "act_fn": "gelu",
    }
    gpt2 = {"original_architecture": "GPT2LMHeadModel", "act_fn": "gelu_new"}
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=8, n_heads=4, d_mlp=48, d_vocab=96,
        normalization_type="LN", device="cpu", **(neox if family == "neox" else gpt2),
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3)
            if name.endswith(".w"):
                parameter.add_(1.0)
        model.unembed.b_U.zero_()  # neither family has one; folding makes one
    if fold:
        state = model.state_dict()
        model.load_and_process_state_dict(
            state, fold_ln=True, center_writing_weights=True, center_unembed=False,
            fold_value_biases=True,
        )  # fmt: skip
    keep = random_keep((2, 4, 8), 4 if family == "neox" else 0)
    thin = slim(model, SlicePlan(keep))
    torch.testing.assert_close(logits(thin), masked(model, keep), atol=1e-4, rtol=0)


@EVERY
def test_cache_shrinks_by_what_the_plan_says(originals, name):
    hf, rotary_dim = originals[name], CONFIGS[name][1]
    plan = SlicePlan(random_keep(shape_of(hf), rotary_dim))
    thin = slim(hf, plan)
    with torch.no_grad():
        cache = thin(TOKENS, use_cache=True).past_key_values
    tokens = TOKENS.numel()
    window = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    if not any(window):
        n_bytes = [
            sum(getattr(layer, kind).numel() * 4 for layer in cache.layers)
            for kind in ("keys", "values")
        ]
        assert n_bytes == [n * tokens for n in plan.cache_bytes_per_token(rotary_dim)]
    assert [layer.keys.shape[-1] for layer in cache.layers] == list(plan.key_widths(rotary_dim))


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(originals, name, side):
    hf = originals[name]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    row = TOKENS[:1, :9]
    padded = torch.zeros(2, 14, dtype=torch.long)
    where = slice(5, 14) if side == "left" else slice(0, 9)
    padded[0, where], padded[1] = row[0], TOKENS[1]
    attention_mask = torch.zeros_like(padded)
    attention_mask[0, where], attention_mask[1] = 1, 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
    got = logits(thin, padded, attention_mask=attention_mask, position_ids=position_ids)
    torch.testing.assert_close(got[:1, where], logits(thin, row), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1:], logits(thin, TOKENS[1:2]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-3-rope", "mistral", "gemma3", "neox", "gpt2"])
def test_generate_with_and_without_a_cache(originals, name):
    hf = originals[name]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    args = {"attention_mask": mask, "pad_token_id": 0, **settings}
    cached = thin.generate(TOKENS, use_cache=True, **args)
    torch.testing.assert_close(cached, thin.generate(TOKENS, use_cache=False, **args))
    static = thin.generate(TOKENS, cache_implementation="static", disable_compile=True, **args)
    torch.testing.assert_close(cached, static)
    beams = thin.generate(TOKENS[:1], num_beams=3, pad_token_id=0, **settings)
    assert beams.shape == (1, 22)


def test_prompt_in_two_pieces(originals):
    hf = originals["llama"]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), 16)))
    with torch.no_grad():
        first = thin(TOKENS[:, :5], use_cache=True)
        rest = thin(TOKENS[:, 5:], past_key_values=first.past_key_values)
        rest.past_key_values.crop(-3)
        again = thin(TOKENS[:, -3:], past_key_values=rest.past_key_values)
    torch.testing.assert_close(rest.logits, logits(thin)[:, 5:], atol=1e-4, rtol=0)
    torch.testing.assert_close(again.logits, logits(thin)[:, -3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "neox", "qwen3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_implementations(originals, name, implementation):
    hf = originals[name]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    wanted = logits(thin)
    thin.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    if implementation == "eager":
        weights = thin(TOKENS, output_attentions=True).attentions
        assert len(weights) == 3
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 4, 14))


@EVERY
def test_save_and_load(originals, name, tmp_path):
    hf = originals[name]
    plan = SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1]))
    thin = slim(hf, plan)
    thin.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".json",
        ".json",
        ".py",
        ".safetensors",
    ]
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        load_slim(tmp_path),
    ):
        assert type(again) is type(thin)
        assert torch.equal(logits(again), logits(thin))
        assert torch.equal(plan_of(again.config).keep, plan.keep)
        again.tie_weights()
        assert torch.equal(logits(again), logits(thin))


@pytest.mark.parametrize("name", ["llama", "gemma3", "neox", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(originals, name, dtype, tmp_path):
    hf = originals[name]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    wanted = logits(thin)
    thin.save_pretrained(tmp_path / "full")
    half = load_slim(tmp_path / "full", dtype=dtype)
    from_half = slim(copy.deepcopy(hf).to(dtype), SlicePlan(plan_of(thin.config).keep))
    for model in (half, from_half):
        got = logits(model)
        assert got.dtype == dtype
        share = (got.float() - wanted).abs().max() / wanted.abs().max()
        assert share < (0.1 if dtype == torch.bfloat16 else 0.02)
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(logits(load_slim(tmp_path / "half")), logits(half))


COMPILE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from slim_families import CONFIGS, random_keep, random_model, shape_of
from gainlens.export import SlicePlan, slim
tokens = torch.randint(3, 96, (2, 10))
for name in ("llama", "neox"):
    hf = random_model(name)
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    compiled = torch.compile(thin, backend="aot_eager", fullgraph=True)
    difference = (compiled(tokens, use_cache=False).logits - thin(tokens).logits).abs().max()
    assert difference <= 1e-4, (name, difference)
"""


def test_compiles_without_a_break():
    """In a process of its own: the run-time shape checks of these tests can't be traced."""
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, here], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_gradients_reach_the_thin_weights(originals):
    hf = originals["llama"]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), 16)))
    thin.train()
    thin(TOKENS, labels=TOKENS).loss.backward()
    for module in thin.modules():
        if isinstance(module, SlimAttention):
            assert module.k_proj.weight.grad.abs().max() > 0
            assert module.q_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in hf.parameters())


def test_slim_shares_no_memory(originals):
    hf = copy.deepcopy(originals["llama"])
    thin = slim(hf, SlicePlan.identity(hf))
    before = logits(thin)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
    assert torch.equal(logits(thin), before)


def test_weights_are_really_smaller(originals):
    hf = originals["llama"]
    keep = torch.zeros(3, 2, 16, dtype=torch.bool)
    keep[..., [0, 3, 8, 11]] = True
    thin = slim(hf, SlicePlan(keep))
    attention = thin.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (2 * 4, 32)
    assert attention.q_proj.weight.shape == (4 * 4, 32)
    saved = 3 * (2 + 4) * 12 * 32
    assert hf.num_parameters() - thin.num_parameters() == saved


def test_plan_of_another_model(originals):
    plan = SlicePlan.identity(originals["llama-biased"])
    with pytest.raises(InputError, match=r"another model \(weights [0-9a-f]{12}\)"):
        slim(originals["qwen2"], plan)
    with pytest.raises(InputError, match=r"shape \(3, 2, 8\): .* = \(3, 2, 16\)"):
        slim(originals["llama"], SlicePlan(torch.ones(3, 2, 8, dtype=torch.bool)))


def test_half_a_pair(originals):
    keep = torch.ones(3, 2, 16, dtype=torch.bool)
    keep[1, 0, 9] = False
    with pytest.raises(InputError, match="keeps 15 dimensions of key head 0 of layer 1"):
        slim(originals["llama"], SlicePlan(keep))


def test_models_that_can_not_be_slim(unchecked, originals):
    config = transformers.OlmoConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"OlmoForCausalLM .* known are Llama"):
        slim(model, SlicePlan(torch.ones(1, 4, 8, dtype=torch.bool)))
    with pytest.raises(InputError, match="expected a TransformerBridge"):
        slim(torch.nn.Linear(2, 2), SlicePlan(torch.ones(1, 4, 8, dtype=torch.bool)))
    with pytest.raises(InputError, match="expected a cut"):
        slim(originals["llama"], torch.ones(3, 2, 16, dtype=torch.bool))


def test_folded_bridge_is_refused(originals):
    bridge = to_bridge(copy.deepcopy(originals["llama"]), "llama", None)
    bridge.enable_compatibility_mode()
    with pytest.raises(UnsupportedModelError, match="compatibility mode"):
        slim(bridge, SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool)))


def test_attention_that_is_not_what_it_seems(originals):
    """A model that does something else to its keys is found out by its logits."""
    hf = copy.deepcopy(originals["llama"])
    attention = hf.model.layers[1].self_attn
    attention.scaling *= 3
    with pytest.raises(UnsupportedModelError, match="differ from the masked original's"):
        slim(hf, SlicePlan.identity(hf))


def test_tiny_of_all_kinds(any_tiny, tiny_validation):
    keep = random_keep((4, 2, 32), 32, seed=3)
    thin = slim(any_tiny, SlicePlan(keep))
    with torch.no_grad():
        hooks = gl.ablation_hooks(any_tiny, gl.KeyMask(keep), mode="zero")
        wanted = any_tiny.run_with_hooks(tiny_validation, fwd_hooks=hooks)
    torch.testing.assert_close(logits(thin, tiny_validation), wanted, atol=1e-4, rtol=0)
    assert issubclass(GainlensError, Exception)
