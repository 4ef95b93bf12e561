"""Slim models where stock ones run: autocast, static caches, copies, embeddings of another size."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from slim_families import CONFIGS, random_keep, shape_of
from transformers import DynamicCache, StaticCache

from gainlens.export import SlicePlan, export_model, load_slim, slim

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(5))
EVERY = pytest.mark.parametrize("name", list(CONFIGS))


@pytest.fixture(scope="module")
def thin(originals):
    made = {}

    def get(name):
        if name not in made:
            hf = originals[name]
            made[name] = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
        return made[name]

    return get


@EVERY
@pytest.mark.parametrize("attention", ["gainlens_sliced", "eager", "sdpa"])
def test_autocast(thin, name, attention):
    """As near to float32 as the stock model is under autocast, with and without gradients."""
    model = copy.deepcopy(thin(name))
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers runs this family without it")
    model.set_attn_implementation(attention)
    with torch.no_grad():
        exact = model(TOKENS).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = DynamicCache(config=model.config)
            got = model(TOKENS, past_key_values=cache).logits
            new = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    assert (got.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    assert new.shape == (2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_trainer_evaluates_in_bfloat16(thin, tmp_path):
    """``Trainer(bf16=True)`` runs the model under autocast without gradients."""
    model = copy.deepcopy(thin("llama"))
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[], disable_tqdm=True
    )
    got = transformers.Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        assert got == pytest.approx(float(model(TOKENS, labels=TOKENS).loss), rel=0.02)


@pytest.mark.parametrize("first", [True, False])
def test_a_cache_may_go_in_and_out_of_autocast(thin, first):
    model = thin("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        exact = model(TOKENS).logits[:, 8:]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            model(TOKENS[:, :8], past_key_values=cache)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            got = model(TOKENS[:, 8:], past_key_values=cache).logits
    assert (got.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@EVERY
def test_static_caches_and_chunks(thin, name):
    if name == "falcon-alibi":
        pytest.skip("transformers' own code for its biases takes no mask of a static cache")
    model = thin(name)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["use_cache"] = True  # MPT's configuration leaves it out
    wanted = model.generate(TOKENS, **settings)
    for more in ({}, {"prefill_chunk_size": 5}):
        got = model.generate(TOKENS, cache_implementation="static", **settings, **more)
        assert torch.equal(got, wanted), more
    cache = StaticCache(config=model.config, max_cache_len=20)
    heads, d_head = shape_of(model)[1:]
    cache.early_initialization(2, heads, d_head, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
    attention = [m for m in model.modules() if hasattr(m, "value_dim")]
    assert [layer.keys.shape[-1] for layer in cache.layers] == [m.head_dim for m in attention]


@EVERY
def test_attentions_of_copies_and_of_the_stock_model(thin, originals, name):
    """In eager mode, after a copy, and without a change to what stock models record."""
    model = copy.deepcopy(thin(name))
    model.set_attn_implementation("eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    stock = type(originals[name])(copy.deepcopy(originals[name].config)).eval()
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        for one in (copy.deepcopy(model), model, copy.deepcopy(model), stock):
            found = one(TOKENS, output_attentions=True).attentions
            assert len(found) == layers
            assert all(a.shape == (2, heads, 12, 12) for a in found)
            torch.testing.assert_close(found[0].sum(-1), torch.ones(2, heads, 12))


@pytest.mark.parametrize("size", [100, 80])
@pytest.mark.parametrize("engine", ["gainlens", "transformers"])
def test_embeddings_of_another_size(originals, size, engine, tmp_path):
    hf = originals["llama"]
    keep = torch.zeros(3, 2, 16, dtype=torch.bool)
    keep[..., [0, 3, 8, 11]] = True
    model = slim(hf, SlicePlan(keep, (4,) * 3), TOKENS)
    model.resize_token_embeddings(size, mean_resizing=False)
    folder = export_model(model, tmp_path / "out", engine)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read.config.vocab_size == size
    tokens = TOKENS % size
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)
    before = copy.deepcopy(hf)
    before.resize_token_embeddings(size, mean_resizing=False)
    again = slim(before, SlicePlan(keep))
    export_model(again, tmp_path / "again")
    assert load_slim(tmp_path / "again").config.vocab_size == size
