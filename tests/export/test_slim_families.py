"""Every family against an oracle that is not gainlens': keys zeroed in transformers' own cache.

In every family the keys pass through ``Cache.update`` after all norms and rotations, so a cache
that zeroes what is cut masks the unmodified original. It serves generation as well.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from slim_families import CONFIGS, SMALL, MaskedCache, random_keep, random_model, shape_of

from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export import SlicePlan, canonical_plan, export_model, load_slim, modeling, slim
from gainlens.export.families import FAMILIES
from gainlens.export.family import usual_scale
from gainlens.export.layout import KeyPairs
from gainlens.export.speed_ledger import ledger
from gainlens.model.wrapping import to_bridge

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (2, 14), generator=torch.Generator().manual_seed(5))
EVERY = pytest.mark.parametrize("name", list(CONFIGS))
SETTINGS = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, **kwargs).logits


def cut_of(name, hf):
    return random_keep(shape_of(hf), CONFIGS[name][1])


def padded():
    """The first row has four positions less; windows of 6 are passed all the same."""
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    return mask


@EVERY
def test_logits(originals, name):
    hf, keep = originals[name], cut_of(name, originals[name])
    thin = slim(hf, SlicePlan(keep))
    wanted = logits(hf, past_key_values=MaskedCache(keep, hf.config), use_cache=True)
    assert (logits(hf) - wanted).abs().max() > 0.05
    for use_cache in (False, True):
        got = logits(thin, use_cache=use_cache)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@EVERY
def test_generation(originals, name):
    """Left padding, two rows, and ten tokens after a prompt that is longer than every window."""
    hf, keep = originals[name], cut_of(name, originals[name])
    thin = slim(hf, SlicePlan(keep))
    mask = padded()
    with torch.no_grad():
        wanted, got = (
            model.generate(
                TOKENS, attention_mask=mask, use_cache=True, past_key_values=cache,
                output_logits=True, return_dict_in_generate=True, **SETTINGS,
            )
            for model, cache in ((hf, MaskedCache(keep, hf.config)), (thin, None))
        )  # fmt: skip
    assert torch.equal(got.sequences, wanted.sequences)
    assert got.sequences.shape == (2, 24)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@EVERY
def test_values_of_any_width(originals, name):
    """At full rank the value path changes nothing, and half of it runs."""
    hf = originals[name]
    plan = SlicePlan(cut_of(name, hf))
    if name == "mpt-bounded":
        with pytest.raises(UnsupportedModelError, match="bounds each of its values"):
            slim(hf, plan.with_values(0.5), TOKENS)
        return
    d_head = plan.shape[2]
    wanted = logits(slim(hf, plan))
    widths = (d_head, d_head - 1, d_head)
    near = logits(slim(hf, plan.with_values(widths), TOKENS))
    half = slim(hf, plan.with_values(0.5), TOKENS)
    assert half.gainlens_parity.difference < 1e-4
    assert (near - wanted).abs().max() < (logits(half) - wanted).abs().max()


@EVERY
def test_another_attention_of_transformers(originals, name):
    hf = originals[name]
    thin = slim(hf, SlicePlan(cut_of(name, hf)))
    wanted = logits(thin)
    thin.set_attn_implementation("eager")
    assert thin.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    weights = thin(TOKENS, output_attentions=True).attentions
    assert len(weights) == 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 14))


@pytest.mark.parametrize("name", ["smollm3", "cohere2"])
def test_single_dimensions_where_nothing_rotates(originals, name):
    hf = originals[name]
    keep = cut_of(name, hf)
    keep[1] = False
    keep[1, 0, [0, 3, 4]] = keep[1, 1, [1]] = True
    thin = slim(hf, SlicePlan(keep))
    wanted = logits(hf, past_key_values=MaskedCache(keep, hf.config), use_cache=True)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    assert SlicePlan(keep).key_widths(CONFIGS[name][1])[1] == 3
    keep[2, 0, 0] = ~keep[2, 0, 0]
    with pytest.raises(InputError, match="of layer 2, among them"):
        slim(hf, SlicePlan(keep))


@pytest.mark.parametrize("name", ["ernie", "cohere", "gptj"])
def test_half_an_adjacent_pair(originals, name):
    keep = torch.ones(shape_of(originals[name]), dtype=torch.bool)
    keep[1, 0, 3] = False
    with pytest.raises(InputError, match="among them 2 without 3"):
        slim(originals[name], SlicePlan(keep))


@pytest.mark.parametrize("name", ["opt", "gptneo", "bloom", "mpt", "falcon-alibi"])
def test_canonical_directions(originals, name):
    """What a head without rotation can do best; biases by position leave its product alone."""
    hf = originals[name]
    whole = slim(hf, canonical_plan(hf, 0.0))
    torch.testing.assert_close(logits(whole), logits(hf), atol=1e-4, rtol=0)
    half = slim(hf, canonical_plan(hf, 0.5))
    assert half.gainlens_parity.difference < 1e-4


def test_no_canonical_directions(originals):
    with pytest.raises(UnsupportedModelError, match="a bound on queries, keys and values"):
        canonical_plan(originals["mpt-bounded"])
    shared = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
        )
    )
    with pytest.raises(UnsupportedModelError, match="share a key head"):
        canonical_plan(shared)


@pytest.mark.parametrize("name", ["olmo2", "qwen3", "cohere-normed", "stablelm-normed"])
def test_a_norm_keeps_the_projections_whole(originals, name):
    hf = originals[name]
    thin = slim(hf, SlicePlan(cut_of(name, hf)))
    for before, after in zip(hf.model.layers, thin.model.layers, strict=True):
        assert after.self_attn.k_proj.weight.shape == before.self_attn.k_proj.weight.shape
    found = ledger(slim(hf, SlicePlan.identity(hf)), thin, measure=False)
    assert found["saves"] == "cache alone"
    assert "projections stay whole" in found["why"]
    assert found["saved"]["key_cache"] > 0.2
    of_the_norms = sum(
        p.numel() for n, p in hf.named_parameters() if "q_norm" in n or "k_norm" in n
    )
    of_the_norms += sum(p.numel() for n, p in hf.named_parameters() if "_layernorm.norms" in n)
    assert hf.num_parameters() - thin.num_parameters() <= of_the_norms


def test_the_card_says_what_is_saved(originals, tmp_path):
    for name, text in (
        ("olmo2", "| thin keys save | the cache alone: a norm acts on queries and keys"),
        ("granite", "| thin keys save | weights and cache |"),
    ):
        hf = originals[name]
        thin = slim(hf, SlicePlan(cut_of(name, hf)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no tokenizer
            folder = export_model(thin, tmp_path / name)
        assert text in (folder / "README.md").read_text(encoding="utf-8")


def test_configurations_that_are_refused():
    config = transformers.GemmaConfig(**SMALL, head_dim=16, use_bidirectional_attention=True)
    model = transformers.GemmaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="its attention is bidirectional"):
        slim(model, SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool)))


def test_a_row_that_is_wrong_for_the_model(originals, monkeypatch):
    """It is found out by the logits, in one line, before anything is handed on."""
    wrong = replace(FAMILIES["GraniteForCausalLM"], scale=usual_scale)
    monkeypatch.setitem(modeling.CLASSES, "Granite", modeling._classes(wrong))
    hf = originals["granite"]
    with pytest.raises(UnsupportedModelError, match="GraniteForCausalLM: .* differ from") as caught:
        slim(hf, SlicePlan.identity(hf))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["transformers", "bridge"])
def test_layers_of_different_kinds(originals, kind):
    hf = copy.deepcopy(originals["llama"])
    other = originals["llama-biased"].model.layers[1].self_attn
    hf.model.layers[1].self_attn = copy.deepcopy(other)
    plan = SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool))
    model = hf
    if kind == "bridge":
        model = to_bridge(copy.deepcopy(originals["llama"]), "llama", None)
        attention = model.original_model.model.layers[1].self_attn
        attention.q_proj._original_component = torch.nn.Linear(32, 64)
    with pytest.raises(UnsupportedModelError, match="layer 1 differs from layer 0 in") as caught:
        slim(model, plan)
    assert "\n" not in str(caught.value)
    hf = copy.deepcopy(originals["llama"])
    hf.config.num_hidden_layers = 4
    with pytest.raises(UnsupportedModelError, match="in all 4 layers: layer 3 has none"):
        slim(hf, SlicePlan(torch.ones(4, 2, 16, dtype=torch.bool)))


def test_slots_of_adjacent_pairs(originals, tmp_path):
    """Pairs that turn by frequencies of the plan's own: the same as a model with those."""
    hf = originals["ernie"]
    own = hf.model.rotary_emb.inv_freq.double()
    plan = SlicePlan(cut_of("ernie", hf), frequencies=(own * 1.1)[None, None])
    thin = slim(hf, plan)
    other = copy.deepcopy(hf)
    other.model.rotary_emb.inv_freq.mul_(1.1)
    wanted = logits(other, past_key_values=MaskedCache(plan.keep, hf.config), use_cache=True)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    thin.save_pretrained(tmp_path)
    assert torch.equal(logits(load_slim(tmp_path)), logits(thin))
    with pytest.raises(InputError, match="layer 1 rotates nothing"):
        whole = torch.ones(3, 2, 8, dtype=torch.bool)
        slim(originals["cohere2"], SlicePlan(whole, frequencies=torch.ones(1, 1, 4)))


def test_slots_where_each_layer_computes_its_angles():
    config = transformers.GPTJConfig(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8
    )
    torch.manual_seed(0)
    hf = transformers.GPTJForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.2)
    shape = (2, 4, 8)
    same = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    keep = random_keep(shape, KeyPairs(8, "adjacent"))
    one = slim(hf, SlicePlan(keep, frequencies=same[None, None]))
    torch.testing.assert_close(logits(one), logits(slim(hf, SlicePlan(keep))), atol=1e-5, rtol=0)
    two = slim(hf, SlicePlan(keep, frequencies=same[None, None] * 1.2))
    assert (logits(two) - logits(one)).abs().max() > 1e-3


def test_the_matrix_has_weights_that_matter():
    """A soft cap and a window that never bind would test nothing."""
    hf = random_model("gemma2")
    loose = copy.deepcopy(hf)
    for layer in loose.model.layers:
        layer.self_attn.attn_logit_softcapping = 50.0
    assert (logits(loose) - logits(hf)).abs().max() > 1e-3
