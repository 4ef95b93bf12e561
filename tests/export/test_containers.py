"""Thin keys and full values in stock classes: transformers' MiMoV2Flash and llama.cpp's step35."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from slim_families import shape_of

from gainlens.export import ENGINES, EngineLimitError, ParityError, SlicePlan, export_model, slim
from gainlens.export.building import float_copy
from gainlens.export.writing import check_plan

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(5))
PAIRS = [0, 2, 5]
PLAIN = ["llama", "llama-3-rope", "llama-yarn"]
FILES = {"transformers": "config.json", "llama.cpp": "model.gguf"}


def shared(hf, values=None):
    layers, heads, d_head = shape_of(hf)
    keep = torch.zeros(layers, heads, d_head, dtype=torch.bool)
    for pair in PAIRS[: d_head // 4 - 1]:
        keep[..., [pair % (d_head // 2), pair % (d_head // 2) + d_head // 2]] = True
    return SlicePlan(keep, None if values is None else (values,) * layers)


def masked(hf, keep, tokens=TOKENS):
    """The original's logits with cut keys zeroed by plain hooks: whole pairs commute with RoPE."""
    handles = []
    for layer, module in enumerate(hf.model.layers):
        flat = keep[layer].flatten().float()
        hook = partial(lambda m, args, out, flat: out * flat, flat=flat)
        handles.append(module.self_attn.k_proj.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return hf(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", PLAIN)
def test_transformers_keeps_full_values(originals, name, tmp_path):
    hf = originals[name]
    plan = shared(hf)
    width, d_head = int(plan.keep[0, 0].sum()), plan.shape[2]
    folder = export_model(slim(hf, plan), tmp_path / "out", "transformers")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock) is transformers.MiMoV2FlashForCausalLM
    torch.testing.assert_close(logits(stock), masked(hf, plan.keep), atol=1e-4, rtol=0)
    cache = stock(TOKENS[:1]).past_key_values
    assert {layer.keys.shape[-1] for layer in cache.layers} == {width}
    assert {layer.values.shape[-1] for layer in cache.layers} == {d_head}
    stock.set_attn_implementation("gainlens_sliced")
    torch.testing.assert_close(logits(stock), masked(hf, plan.keep), atol=1e-4, rtol=0)
    whole = stock.generate(TOKENS[:, :8], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(stock.generate(TOKENS[:, :8], max_new_tokens=5, do_sample=False), whole)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_llama_cpp_keeps_full_values(originals, name, precision, tmp_path):
    hf = originals[name]
    thin = slim(hf, shared(hf))
    folder = export_model(thin, tmp_path / "out", "llama.cpp", precision=precision)
    read = ENGINES["llama.cpp"].read_back(folder)
    wanted = float_copy(thin, partial(ENGINES["llama.cpp"].rounded, precision=precision))
    torch.testing.assert_close(logits(read), logits(wanted), atol=1e-4, rtol=0)
    if precision == "f32":
        expected = masked(hf, shared(hf).keep)
        torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=0)


def test_what_llama_cpp_is_told(originals, tmp_path):
    """Each setting by hand, and the frequencies that llama.cpp computes from them."""
    import gguf

    hf = originals["llama"]
    folder = export_model(slim(hf, shared(hf)), tmp_path / "out", "llama.cpp")
    reader = gguf.GGUFReader(str(folder / "model.gguf"))

    def setting(name):
        return reader.get_field(name).contents()

    assert setting("general.architecture") == "step35"
    told = {
        "block_count": 4, "nextn_predict_layers": 1, "attention.sliding_window": 64,
        "attention.sliding_window_pattern": [False, False, False, True],
        "expert_feed_forward_length": 0, "rope.dimension_count": 12,
        "rope.dimension_count_swa": 6, "attention.key_length": 6, "attention.value_length": 16,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    assert {name: setting(f"step35.{name}") for name in told} == told
    tensors = {t.name: t for t in reader.tensors}
    assert "output.weight" in tensors  # tied, and stored twice
    assert not any(name.startswith("blk.3.") for name in tensors)
    factors = tensors["rope_freqs.weight"].data.astype(np.float64)
    theta = setting("step35.rope.freq_base")
    used = theta ** (-np.arange(0, 6, 2) / 6) / factors
    np.testing.assert_allclose(used, [theta ** (-2 * k / 16) for k in PAIRS], rtol=1e-6)
    attention = hf.model.layers[1].self_attn
    rows = attention.k_proj.weight.detach().reshape(2, 16, -1)[:, PAIRS + [8 + k for k in PAIRS]]
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"].data, rows.flatten(0, 1).numpy())
    np.testing.assert_array_equal(
        tensors["blk.1.attn_v.weight"].data, attention.v_proj.weight.detach().numpy()
    )


@pytest.mark.parametrize("engine", list(FILES))
def test_values_are_cut_only_when_asked(originals, engine, tmp_path):
    """Narrower, equal and in between: the container follows from the widths."""
    hf = originals["llama"]
    kinds = {}
    for values in (None, 12, 6, 4):
        plan = shared(hf, values)
        thin = slim(hf, plan, TOKENS)
        folder = export_model(thin, tmp_path / str(values), engine)
        read = ENGINES[engine].read_back(folder)
        torch.testing.assert_close(logits(read), logits(thin), atol=1e-4, rtol=0)
        if engine == "transformers":
            kinds[values] = type(read).__name__
        else:
            import gguf

            field = gguf.GGUFReader(str(folder / "model.gguf")).get_field("general.architecture")
            kinds[values] = field.contents()
    wide, equal = {
        "transformers": ("MiMoV2FlashForCausalLM", "LlamaForCausalLM"),
        "llama.cpp": ("step35", "llama"),
    }[engine]
    assert kinds == {None: wide, 12: wide, 6: equal, 4: wide}


@pytest.mark.parametrize(
    ("name", "engine", "what"),
    [
        ("llama-biased", "transformers", "o_proj"),
        ("llama-biased", "llama.cpp", "q_proj, k_proj, v_proj, o_proj"),
        ("qwen2", "llama.cpp", "q_proj, k_proj, v_proj"),
    ],
)
def test_biases_that_a_container_lacks(originals, name, engine, what, tmp_path):
    """Refused before the model is cut, with the plan that fits a stock Llama."""
    hf = originals[name]
    plan = shared(hf)
    for refused in (
        lambda: check_plan(hf, plan, engine),
        lambda: export_model(slim(hf, plan), tmp_path / "out", engine),
    ):
        with pytest.raises(EngineLimitError, match=f"no bias on {what}: ") as caught:
            refused()
    export_model(slim(hf, caught.value.nearest, TOKENS), tmp_path / "fits", engine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fits"]


def test_biases_of_queries_keys_and_values_fit_transformers(originals, tmp_path):
    hf = originals["qwen2"]
    folder = export_model(slim(hf, shared(hf)), tmp_path / "out", "transformers")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    bias = read.model.layers[1].self_attn.k_proj.bias
    assert bias.abs().max() > 0
    torch.testing.assert_close(logits(read), logits(slim(hf, shared(hf))), atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp", "vllm"])
def test_sets_per_layer_and_other_widths(originals, engine, monkeypatch, tmp_path):
    hf = originals["llama"]
    monkeypatch.setattr(ENGINES["vllm"], "heads", (6, 8))
    keep = shared(hf).keep.clone()
    keep[1] = keep[1].roll(1, -1)
    with pytest.raises(EngineLimitError, match=r"scope='universal'; the nearest .*nearest_shared"):
        check_plan(hf, SlicePlan(keep), engine)
    with pytest.raises(EngineLimitError, match="values of one width|values as wide as keys"):
        check_plan(hf, SlicePlan(shared(hf).keep, (16, 16, 12)), engine)
    if engine == "vllm":
        with pytest.raises(EngineLimitError, match="values as wide as keys") as caught:
            check_plan(hf, shared(hf), engine)
        export_model(slim(hf, caught.value.nearest, TOKENS), tmp_path / "out", engine)


def test_limits_are_said_before_the_work(originals, tmp_path):
    hf = originals["llama"]
    with pytest.warns(UserWarning, match="llama.cpp of June 2026 or later") as said:
        check_plan(hf, shared(hf), "llama.cpp")
    text = " ".join(str(w.message) for w in said)
    for limit in ("a tied one twice", "does not shift", "CUDA and Metal", "multiple of 32"):
        assert limit in text
    with pytest.warns(UserWarning, match="neither transformers 4 nor vLLM"):
        check_plan(hf, shared(hf), "transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in FILES:
            check_plan(hf, shared(hf, 6), engine)


@pytest.mark.parametrize("engine", list(FILES))
@pytest.mark.parametrize("part", ["k_proj", "v_proj", "o_proj"])
def test_the_gate_sees_a_wrong_row(originals, engine, part, tmp_path, monkeypatch):
    thin = slim(originals["llama"], shared(originals["llama"]))
    row = ENGINES[engine]
    write = type(row).write

    def wrong(self, model, folder, precision, tokenizer):
        spoiled = copy.deepcopy(model)
        with torch.no_grad():
            getattr(spoiled.model.layers[1].self_attn, part).weight[0] *= 1.02
        write(self, spoiled, folder, precision, tokenizer)

    monkeypatch.setattr(type(row), "write", wrong)
    with pytest.raises(ParityError):
        export_model(thin, tmp_path / "out", engine)
    assert list(tmp_path.iterdir()) == []
