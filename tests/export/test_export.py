"""Checkpoints for stock engines: what they compute, refuse, and leave behind."""

from __future__ import annotations

import copy
import json
import signal
import sys
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from slim_families import CONFIGS, random_keep, shape_of

import gainlens as gl
from gainlens.errors import InputError
from gainlens.export import (
    ENGINES,
    EngineLimitError,
    ParityError,
    SlicePlan,
    export_model,
    load_slim,
    slim,
    writing,
)
from gainlens.export.building import float_copy
from gainlens.export.engines import stock
from gainlens.export.engines.base import DTYPES
from gainlens.export.engines.llama_cpp import llama_from_gguf

TOKENS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(5))
STOCK = ["llama", "llama-biased", "llama-3-rope", "llama-yarn", "qwen2"]


def shared_plan(hf, width, values=True):
    layers, heads, d_head = shape_of(hf)
    keep = torch.zeros(layers, heads, d_head, dtype=torch.bool)
    half = d_head // 2
    pairs = torch.randperm(half, generator=torch.Generator().manual_seed(2))[: width // 2]
    keep[..., pairs] = keep[..., pairs + half] = True
    return SlicePlan(keep, (width,) * layers if values else None)


@pytest.fixture(scope="module")
def stock_slim(originals):
    made = {}
    for name in STOCK:
        hf = originals[name]
        made[name] = slim(hf, shared_plan(hf, shape_of(hf)[2] // 2), TOKENS)
    return made


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", STOCK)
def test_stock_checkpoint_has_the_slim_logits(stock_slim, name, tmp_path):
    thin = stock_slim[name]
    export_model(thin, tmp_path / "out", "transformers")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "gainlens" not in config
    stock_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock_model) is transformers.LlamaForCausalLM
    torch.testing.assert_close(logits(stock_model), logits(thin), atol=1e-4, rtol=0)
    cache = stock_model(TOKENS[:1]).past_key_values
    assert cache.layers[0].keys.shape[-1] == cache.layers[0].values.shape[-1] == config["head_dim"]


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_gguf_has_the_slim_logits(stock_slim, name, precision, tmp_path):
    """In float32 as they are, else those of the slim model rounded weight by weight."""
    thin = stock_slim[name]
    folder = export_model(thin, tmp_path / "out", "llama.cpp", precision=precision)
    read = llama_from_gguf(folder / "model.gguf")
    wanted = float_copy(thin, partial(ENGINES["llama.cpp"].rounded, precision=precision))
    torch.testing.assert_close(logits(read), logits(wanted), atol=1e-4, rtol=0)
    if precision == "f32":
        torch.testing.assert_close(logits(wanted), logits(thin), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_rounded_weights_are_as_near_as_their_format_allows(stock_slim, engine):
    """Half a step: of q8_0 1/127 of the block's largest (and its scale is float16)."""
    thin, row = stock_slim["llama-biased"], ENGINES[engine]
    half_step = {"f16": 2**-11, "bf16": 2**-8}
    for precision in row.precisions[1:]:
        rounded = row.rounded(float_copy(thin), precision)
        for name, new in rounded.items():
            old = thin.state_dict()[name]
            if not old.is_floating_point():
                continue
            size = old.abs().clamp_min(1e-4)
            if precision == "q8_0" and old.ndim == 2:
                assert not torch.equal(new, old) or not old.any()
                blocks = old.reshape(-1, 32) if old.shape[1] % 32 == 0 else None
                if blocks is not None:
                    size = blocks.abs().amax(1, keepdim=True).expand_as(blocks).reshape(old.shape)
                    assert ((new - old).abs() <= size * (0.5 / 127 + 2**-11)).all(), name
                    continue
            step = half_step.get(precision, 2**-11)
            assert ((new - old).abs() <= size * step * 1.001).all(), (precision, name)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_own_engine_takes_any_plan(originals, name, tmp_path):
    hf = originals[name]
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), CONFIGS[name][1])))
    export_model(thin, tmp_path / "out")
    assert torch.equal(logits(load_slim(tmp_path / "out")), logits(thin))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_values_alone_when_nothing_is_cut_change_nothing(originals):
    hf = originals["llama"]
    plan = SlicePlan.identity(hf).with_values(16)
    assert (logits(slim(hf, plan)) - logits(hf)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "qwen3"])
def test_value_path_is_the_best_of_its_width(originals, name):
    """No random pair of maps of the same width loses less of the attention's output."""
    from gainlens.export.sources import open_source
    from gainlens.export.values import value_path

    hf = originals[name]
    source = open_source(hf)
    flow = source.flows([TOKENS], None)[1]
    weights = source.attention(1)
    o, n_kv = weights.o.double(), len(weights.v)
    group = o.shape[1] // n_kv

    def lost(projection):
        total = 0.0
        for head in range(o.shape[1]):
            rest = torch.eye(o.shape[2], dtype=torch.float64) - projection[head // group].T
            total += float(
                (o[:, head] @ rest @ flow[head // group] @ (o[:, head] @ rest).T).trace()
            )
        return total

    width = o.shape[2] // 2
    best = value_path(weights, flow, width)
    found = lost(best.projection)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.1 * torch.randn(best.up.shape, generator=generator, dtype=torch.float64)
        up, down = best.up + noise, best.down
        assert lost((up @ down).transpose(1, 2)) >= found - 1e-9
        down = best.down + noise.transpose(1, 2)
        assert lost((best.up @ down).transpose(1, 2)) >= found - 1e-9
    full = value_path(weights, flow, o.shape[2])
    eye = torch.eye(o.shape[2], dtype=torch.float64).expand_as(full.projection)
    torch.testing.assert_close(full.projection, eye, atol=1e-8, rtol=0)


def test_values_need_calibration_text(originals):
    hf = originals["llama"]
    with pytest.raises(InputError, match="expected tokens"):
        slim(hf, SlicePlan.identity(hf).with_values(0.5))


def test_stock_export_goes_back_under_the_microscope(tiny, tiny_validation, tmp_path):
    """TransformerLens bridges the stock checkpoint, and the probes run on it."""
    gains = gl.probe_gains(tiny, tiny_validation, progress=False)
    plan = SlicePlan.from_cut(gl.KeyMask.quietest(gains, 0.5, scope="universal"), values=0.5)
    thin = slim(tiny, plan, tiny_validation)
    folder = export_model(thin, tmp_path / "out", "transformers")
    bridge = gl.load_model(folder)
    gains = gl.probe_gains(bridge, tiny_validation, progress=False)
    assert gains.shape == (4, 2, 16)
    assert torch.isfinite(gains.score("qk")).all()
    with torch.no_grad():
        torch.testing.assert_close(
            bridge(tiny_validation), logits(thin, tiny_validation), atol=1e-4, rtol=0
        )
    again = slim(bridge, SlicePlan.identity(bridge))
    torch.testing.assert_close(
        logits(again, tiny_validation), logits(thin, tiny_validation), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp"])
def test_plans_that_an_engine_can_not_take(originals, engine, tmp_path):
    hf = originals["llama"]
    ragged = slim(hf, SlicePlan(random_keep((3, 2, 16), 16)))
    with pytest.raises(EngineLimitError, match="one set of rotary pairs") as caught:
        export_model(ragged, tmp_path / "out", engine)
    plan = shared_plan(hf, 8, values=False).with_values([16, 16, 8])
    wide_values = slim(hf, plan, TOKENS)
    with pytest.raises(EngineLimitError, match=r"32, 64|values of one width in all layers"):
        export_model(wide_values, tmp_path / "out", engine)
    if engine == "vllm":
        assert caught.value.nearest is None  # no head size up to 16 is one of vLLM's
    else:
        fits = slim(hf, caught.value.nearest, TOKENS)
        export_model(fits, tmp_path / "fits", engine)
        assert "nearest_shared" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["neox", "gpt2", "qwen3", "gemma3"])
def test_families_that_stock_llama_is_not(originals, name, tmp_path):
    hf = originals[name]
    with pytest.raises(EngineLimitError, match="stock LlamaForCausalLM"):
        export_model(slim(hf, SlicePlan.identity(hf)), tmp_path / "out", "vllm")
    with pytest.raises(EngineLimitError, match="sliding window of 6"):
        mistral = originals["mistral"]
        export_model(slim(mistral, SlicePlan.identity(mistral)), tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_holds_something(stock_slim, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        export_model(stock_slim["llama"], tmp_path)
    with pytest.raises(InputError, match="is a file"):
        export_model(stock_slim["llama"], tmp_path / "note.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    export_model(stock_slim["llama"], tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").stat().st_mode & 0o044


def test_unknown_engine_and_precision(stock_slim, tmp_path):
    with pytest.raises(InputError, match=r"engine='tgi' is not one of gainlens, .*llama\.cpp"):
        export_model(stock_slim["llama"], tmp_path / "out", "tgi")
    with pytest.raises(InputError, match="writes f32, f16, q8_0"):
        export_model(stock_slim["llama"], tmp_path / "out", "llama.cpp", precision="q4")
    with pytest.raises(InputError, match="holds no slice plan"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("which", [0, -1])
def test_nothing_is_left_when_the_gate_fails(stock_slim, engine, which, tmp_path, monkeypatch):
    """Files with one row two per cent off are found out, in the lowest precision as well."""
    thin = copy.deepcopy(stock_slim["llama"])
    row = ENGINES[engine]
    if engine == "vllm":
        monkeypatch.setattr(row, "heads", (8,))
    write = type(row).write

    def wrong(self, model, folder, precision, tokenizer):
        spoiled = copy.deepcopy(model)
        with torch.no_grad():
            spoiled.model.layers[1].self_attn.k_proj.weight[0] *= 1.02
        write(self, spoiled, folder, precision, tokenizer)

    monkeypatch.setattr(type(row), "write", wrong)
    with pytest.raises(ParityError, match="nothing was written"):
        export_model(thin, tmp_path / "deep/er/out", engine, precision=row.precisions[which])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("engine", ["gainlens", "transformers", "llama.cpp"])
def test_what_only_float32_shows_is_no_fault(stock_slim, engine, which, tmp_path, monkeypatch):
    """Rounding that the model amplifies is gone in float64; larger models are not run in it."""
    thin, row = stock_slim["llama"], ENGINES[engine]
    precision, real, looks = row.precisions[which], type(row).logits, []

    def amplified(self, folder, batches, device_map=None, dtype=torch.float32):
        looks.append(dtype)
        found = real(self, folder, batches, device_map, dtype)
        return [x + 1e-2 * (dtype == torch.float32) for x in found]

    monkeypatch.setattr(type(row), "logits", amplified)
    export_model(thin, tmp_path / "out", engine, precision=precision)
    assert looks == [torch.float32, torch.float64]
    monkeypatch.setattr(writing, "EXACT", 0)
    with pytest.raises(ParityError, match="nothing was written"):
        export_model(thin, tmp_path / "large", engine, precision=precision)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("change", ["frequency", "scale"])
def test_gate_sees_frequencies_and_scale(stock_slim, tmp_path, monkeypatch, change, precision):
    real_factors, real_stock = stock.longrope_factors, stock.stock_llama

    def wrong_factors(model):
        theta, factors = real_factors(model)
        return theta, [f * 1.02 for f in factors]

    def wrong_scale(model):
        made = real_stock(model)
        with torch.no_grad():
            for layer in made.model.layers:
                layer.self_attn.q_proj.weight.mul_(1.02)
        return made

    if change == "frequency":
        monkeypatch.setattr(stock, "longrope_factors", wrong_factors)
    else:
        monkeypatch.setattr(stock, "stock_llama", wrong_scale)
    with pytest.raises(ParityError):
        export_model(stock_slim["llama"], tmp_path / "out", "transformers", precision=precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ["gainlens", "transformers", "llama.cpp"])
def test_half_precision_models_are_written_exactly(stock_slim, engine, dtype, tmp_path):
    thin = copy.deepcopy(stock_slim["llama"]).to(dtype)
    folder = export_model(thin, tmp_path / "out", engine)
    read = ENGINES[engine].read_back(folder)
    torch.testing.assert_close(logits(read), logits(float_copy(thin)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("engine", ["gainlens", "transformers"])
def test_a_folder_says_the_precision_of_its_weights(stock_slim, engine, precision, tmp_path):
    """Engines load in the type that config.json names, so it is that of the file."""
    thin = stock_slim["llama"]
    folder = export_model(thin, tmp_path / "out", engine, precision=precision)
    held = {t.dtype for t in load_file(folder / "model.safetensors").values()}
    assert held - {torch.int64} == {DTYPES[precision]}, "which dimensions stay is whole numbers"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == DTYPES[precision] and thin.config.dtype == torch.float32


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("engine", ["gainlens", "transformers", "llama.cpp"])
def test_disk_that_fills_up(stock_slim, engine, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match="can't be written"):
            export_model(stock_slim["llama"], tmp_path / "a" / "out", engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_trained_slim_models_are_compared_with_themselves(stock_slim, tmp_path):
    thin = copy.deepcopy(stock_slim["llama"])
    with torch.no_grad():
        thin.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    export_model(thin, tmp_path / "out", "transformers")
