"""Where checkpoints are put: folders that exist, full disks, what is left when anything fails."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
import transformers
from slim_families import SMALL

from gainlens.errors import FileFormatError, GainlensError, InputError
from gainlens.export import ENGINES, EngineLimitError, SlicePlan, export_model, load_slim, slim
from gainlens.export.engines.llama_cpp import llama_from_gguf
from gainlens.export.modeling import plan_of
from gainlens.export.writing import check_plan
from gainlens.files import check_sums
from gainlens.files.folders import SUMS
from gainlens.model import load_model

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(5))


def half(hf):
    keep = torch.zeros(3, 2, 8, dtype=torch.bool)
    keep[..., [0, 2, 4, 6]] = True
    return slim(hf, SlicePlan(keep, (4,) * 3), TOKENS)


def random_llama(**settings):
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **settings)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.15)
    return hf


@pytest.fixture(scope="module")
def thin():
    return half(random_llama())


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of files")
@pytest.mark.parametrize("engine", ["gainlens", "transformers", "llama.cpp"])
@pytest.mark.parametrize("mounted", [False, True])
def test_an_empty_folder_is_filled(thin, engine, mounted, tmp_path, monkeypatch):
    """In one step; where it is, if it is a mounted disk, which can't be replaced."""
    monkeypatch.setattr(os.path, "ismount", lambda path: mounted)
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o750)
    before = folder.stat()
    export_model(thin, folder, engine)
    after = folder.stat()
    assert after.st_mode == before.st_mode
    assert (after.st_ino == before.st_ino) == mounted
    assert not [p for p in [*folder.iterdir(), *tmp_path.iterdir()] if p.name.startswith(".")]
    torch.testing.assert_close(
        logits(ENGINES[engine].read_back(folder)), logits(thin), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_an_empty_folder_is_empty_again_when_it_fails(thin, when, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    if when == "writing":
        monkeypatch.setattr(type(thin), "save_pretrained", _fail)
    else:
        real = os.replace

        def some(old, new):
            if str(new).endswith("model.safetensors"):
                raise OSError(5, "Input/output error")
            real(old, new)

        monkeypatch.setattr(os, "replace", some)
    with pytest.raises(InputError, match="can't be written: Input/output error"):
        export_model(thin, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _fail(*args, **kwargs):
    raise OSError(5, "Input/output error")


def test_parents_that_were_made_go_again(thin, tmp_path):
    with pytest.raises(InputError, match="can't be written"):
        export_model(thin, tmp_path / "new" / ("x" * 300) / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_inside_a_checkpoint_can_be_entered(thin, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "templates").mkdir(mode=0o700)
            (folder / "templates/chat.txt").write_text("hello")

    export_model(thin, tmp_path / "out", tokenizer=Tokenizer())
    mode = (tmp_path / "out/templates").stat().st_mode
    assert mode & 0o055 == 0o055 or sys.platform == "win32"


def test_tokenizers_that_an_engine_can_not_take(thin, tmp_path):
    with pytest.raises(InputError, match="expects a transformers tokenizer"):
        export_model(thin, tmp_path / "out", tokenizer="smollm2")
    with pytest.raises(InputError, match="expected a GGUF file"):
        export_model(thin, tmp_path / "out", "llama.cpp", tokenizer="missing.gguf")
    (tmp_path / "notes.gguf").write_text("not a GGUF file")
    with pytest.raises(InputError, match="can't be read"):
        export_model(thin, tmp_path / "out", "llama.cpp", tokenizer=tmp_path / "notes.gguf")
    none = export_model(thin, tmp_path / "none", "llama.cpp") / "model.gguf"
    with pytest.raises(InputError, match="without a vocabulary"):
        export_model(thin, tmp_path / "out", "llama.cpp", tokenizer=none)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none", "notes.gguf"]


def test_a_vocabulary_is_copied_and_counted(thin, tmp_path):
    import gguf

    def vocabulary(n):
        file = tmp_path / f"{n}.gguf"
        writer = gguf.GGUFWriter(str(file), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{i}" for i in range(n)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return file

    with pytest.raises(InputError, match="has 95 tokens, the model 96"):
        export_model(thin, tmp_path / "out", "llama.cpp", tokenizer=vocabulary(95))
    file = export_model(thin, tmp_path / "out", "llama.cpp", tokenizer=vocabulary(96))
    fields = gguf.GGUFReader(str(file / "model.gguf")).fields
    assert fields["tokenizer.ggml.tokens"].contents() == [f"t{i}" for i in range(96)]
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"


def test_activations_that_vllm_and_llama_cpp_would_not_run(tmp_path, monkeypatch):
    """Both run silu: one stops at the checkpoint, the other computes something else."""
    monkeypatch.setattr(ENGINES["vllm"], "heads", (4,))
    gelu, swish = half(random_llama(hidden_act="gelu")), half(random_llama(hidden_act="swish"))
    for engine in ("vllm", "llama.cpp"):
        with pytest.raises(EngineLimitError, match="hidden_act='gelu'"):
            export_model(gelu, tmp_path / "out", engine)
        export_model(swish, tmp_path / engine, engine)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "vllm")
    assert stock.config.hidden_act == "silu"
    export_model(gelu, tmp_path / "out", "transformers")


@pytest.mark.parametrize("precision", ["f32", "q8_0"])
def test_biases_of_the_mlp_go_into_a_gguf(tmp_path, precision):
    thin = half(random_llama(mlp_bias=True, attention_bias=True))
    file = export_model(thin, tmp_path / "out", "llama.cpp", precision=precision) / "model.gguf"
    read = llama_from_gguf(file)
    assert read.config.mlp_bias
    if precision == "f32":
        torch.testing.assert_close(logits(read), logits(thin), atol=1e-4, rtol=0)


def test_a_compiled_model_is_written_like_its_own(thin, tmp_path):
    export_model(torch.compile(thin, backend="eager"), tmp_path / "out")
    assert torch.equal(logits(load_slim(tmp_path / "out")), logits(thin))


def test_a_plan_is_refused_before_anything_is_cut(originals):
    llama = originals["llama"]
    ragged = torch.ones(3, 2, 16, dtype=torch.bool)
    ragged[0, 0, [1, 9]] = False
    check_plan(llama, SlicePlan(ragged), "gainlens")
    with pytest.raises(EngineLimitError, match="one set of rotary pairs"):
        check_plan(llama, SlicePlan(ragged), "llama.cpp")
    with pytest.raises(InputError, match="plan has shape"):
        check_plan(originals["qwen2"], SlicePlan(ragged), "gainlens")
    ragged[0, 0, 1] = True
    with pytest.raises(InputError, match="expected whole rotary pairs"):
        check_plan(llama, SlicePlan(ragged), "gainlens")
    neox = originals["neox"]
    with pytest.raises(EngineLimitError, match="GPTNeoXForCausalLM is not one"):
        check_plan(neox, SlicePlan.identity(neox), "transformers")


def exported(thin, folder):
    export_model(thin, folder)
    return folder


def reweighted(folder, change):
    """Other weights in an exported folder, as if somebody had written them so."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / SUMS).unlink()


def test_the_plan_is_inside_when_the_folder_appears(thin, tmp_path):
    folder = exported(thin, tmp_path / "out")
    assert SlicePlan.load(folder / "slice_plan.json") == plan_of(thin.config)
    check_sums(folder)


def test_a_slim_folder_with_a_flipped_bit(thin, tmp_path):
    folder = exported(thin, tmp_path / "out")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-11] ^= 4
    file.write_bytes(data)
    with pytest.raises(FileFormatError, match="does not match its checksum"):
        load_slim(folder)


def test_a_slim_folder_with_weights_that_are_not_finite(thin, tmp_path):
    folder = exported(thin, tmp_path / "out")
    reweighted(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(FileFormatError, match="'model.norm.weight' holds NaN"):
        load_slim(folder)


def test_a_slim_folder_whose_weights_were_cut_by_another_plan(thin, tmp_path):
    """As wide, other pairs: every shape fits, and every angle would be wrong."""
    folder = exported(thin, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    plan = plan_of(thin.config)
    other = SlicePlan(plan.keep.roll(1, -1), plan.value_widths)
    config["gainlens"]["plan"] = other.to_json()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SUMS).unlink()
    with pytest.raises(FileFormatError, match="layer 0 keep other rotary pairs than its plan"):
        load_slim(folder)


def test_a_slim_folder_with_a_plan_of_another_shape(thin, tmp_path):
    folder = exported(thin, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["gainlens"]["plan"] = SlicePlan(plan_of(thin.config).keep[:2]).to_json()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SUMS).unlink()
    with pytest.raises(FileFormatError, match=r"shape \(2, 2, 8\), its config of \(3, 2, 8\)"):
        load_slim(folder)


def test_nobody_is_advised_to_run_the_code_of_a_file(thin, tmp_path):
    import pickle

    folder = exported(thin, tmp_path / "out")
    (folder / SUMS).unlink()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": print}))
    for load in (load_slim, load_model):
        with pytest.raises(GainlensError) as caught:
            load(folder)
        assert "weights_only" not in str(caught.value)
        assert "two options" not in str(caught.value)
