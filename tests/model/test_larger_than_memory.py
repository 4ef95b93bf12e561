"""A model whose weights stay on disk gives what the same model gives in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import family_tokens, hugging_face
from safetensors.torch import load_file, save_file
from sharded import sharded_tiny

import gainlens as gl
from gainlens.errors import FileFormatError, GainlensError, InputError, UnsupportedModelError
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import token_losses
from gainlens.model.loading import load_hf, load_model
from gainlens.model.stored_weights import StoredWeights, is_offloaded

accelerate_offload = pytest.importorskip("accelerate.utils.offload")
pytestmark = pytest.mark.one_env  # refused on transformer-lens 3

TOKENS = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(1))
INDEX = "model.safetensors.index.json"
TWO = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sharded_tiny(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(folder):
    return load_model(folder)


@pytest.fixture(scope="module", params=["disk", "cpu and disk"])
def placed(folder, request):
    return load_model(folder, device_map="disk" if request.param == "disk" else TWO)


def refit(model, tokens, mask):
    return gl.refit(model, tokens, mask, rounds=1, iterations=2, ridge=0.1, progress=False)


@pytest.fixture(scope="module")
def wanted(whole):
    gains = gl.probe_gains(whole, TOKENS, scores=("rms", "qk", "fisher"), progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5, "qk")
    return gains, mask, refit(whole, TOKENS, mask)


@pytest.mark.filterwarnings("ignore:tokens holds")
def test_gains_cut_and_losses_are_those_of_the_model_in_memory(whole, placed, wanted):
    gains, mask, cut = wanted
    assert is_offloaded(placed)
    assert not is_offloaded(whole)
    found = gl.probe_gains(placed, TOKENS, scores=("rms", "qk", "fisher"), progress=False)
    assert found.model == gains.model  # the fingerprint of the weights too
    for name, value in gains.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-6, atol=1e-12)
    assert torch.equal(gl.KeyMask.quietest(found, 0.5, "qk").keep, mask.keep)
    again = refit(placed, TOKENS, mask)
    torch.testing.assert_close(again.query_maps, cut.query_maps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.key_maps, cut.key_maps, rtol=1e-5, atol=1e-6)
    with gl.ablate(placed, again):
        losses = token_losses(placed, TOKENS)
    with gl.ablate(whole, cut):
        torch.testing.assert_close(losses, token_losses(whole, TOKENS), rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for n, p in placed.original_model.named_parameters() if "layers.1." in n)


def test_a_backward_pass_keeps_no_weight_but_reads_it_again(folder, monkeypatch):
    model = load_model(folder, device_map="disk")
    gl.model.key_sites(model)
    model_fingerprint(model)
    read: list[str] = []
    loader = accelerate_offload.OffloadedWeightsLoader
    plain = loader.__getitem__

    def counted(self, name):
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(loader, "__getitem__", counted)
    gl.probe_gains(model, TOKENS[:1], scores=("qk",), progress=False)
    assert {read.count(name) for name in read if "layers" in name} == {1}
    read.clear()
    gl.probe_gains(model, TOKENS[:1], scores=("fisher",), progress=False)
    products = [n for n in read if n.endswith("proj.weight") and "layers.0." not in n]
    assert len(set(products)) == 21
    assert {products.count(name) for name in products} == {2}


def test_weights_are_read_one_at_a_time(folder):
    hf = load_hf(folder, device_map="disk")
    weights, plain = StoredWeights(hf), dict(load_hf("tiny").named_parameters())
    assert set(weights.elsewhere) == set(weights)
    for name, tensor in plain.items():
        assert torch.equal(weights[name], tensor)
        assert weights.like(name).is_meta
    assert model_fingerprint(hf) == model_fingerprint(load_hf("tiny"))


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"])
def test_other_layouts(name, tmp_path):
    """Norms with an offset, and joint matrices, which a bridge splits."""
    hugging_face(name).save_pretrained(tmp_path, max_shard_size="20KB")
    tokens = family_tokens()
    gains, whole = (
        gl.probe_gains(load_model(tmp_path, device_map=m), tokens, ("qk", "fisher"), progress=False)
        for m in ("disk", None)
    )
    assert gains.model == whole.model
    for score in ("qk", "fisher"):
        torch.testing.assert_close(gains.score(score), whole.score(score), rtol=1e-5, atol=1e-8)


def test_a_model_that_the_caller_placed(folder, whole):
    """Without ``load_model``: transformers, then TransformerLens."""
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "disk"}, dtype=torch.float32
    )
    model = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
    found = gl.probe_gains(model, TOKENS, progress=False)
    expected = gl.probe_gains(whole, TOKENS, progress=False)
    torch.testing.assert_close(found.score("qk"), expected.score("qk"), rtol=1e-6, atol=0)


def lie(folder):
    """The index places a weight in a file that holds others."""
    places = json.loads((folder / INDEX).read_text())
    other = next(f for f in places["weight_map"].values() if not f.startswith("model-00001"))
    first = next(n for n, f in places["weight_map"].items() if f.startswith("model-00001"))
    places["weight_map"][first] = other
    (folder / INDEX).write_text(json.dumps(places))
    return first


def forget(folder):
    """The index leaves a weight out."""
    places = json.loads((folder / INDEX).read_text())
    del places["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    (folder / INDEX).write_text(json.dumps(places))
    return "its files lack some"


def remove(folder):
    (folder / "model-00002-of-00004.safetensors").unlink()
    return "model-00002-of-00004.safetensors"


def shorten(folder):
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "can't be read"


def rewrite(folder, change):
    name = "model.layers.1.self_attn.k_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def reshape(folder):
    return rewrite(folder, lambda t: t[:-1].contiguous())


def poison(folder):
    def change(tensor):
        tensor[3, 5] = float("nan")
        return tensor

    return rewrite(folder, change)


@pytest.mark.parametrize("spoil", [lie, forget, remove, shorten, reshape, poison])
def test_damaged_files_are_one_line_at_loading(folder, tmp_path, spoil):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    what = spoil(damaged)
    with pytest.raises((InputError, FileFormatError)) as caught:
        load_model(damaged, device_map="disk")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_later_is_one_line(folder, tmp_path):
    where = tmp_path / "going"
    shutil.copytree(folder, where)
    hf = load_hf(where, device_map="disk")
    (where / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileFormatError, match="model-00002") as caught:
        model_fingerprint(hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tiny", {"device_map": "disk"}, "no folder"),
        (None, {"device_map": "disk", "device": "cuda"}, "expected one"),
        (None, {"device_map": "disk", "kind": "hooked"}, "hooked|HookedTransformer"),
        (None, {"device_map": "nowhere"}, "can't be read"),
        (None, {"device_map": {"model": "disk"}}, "can't be read"),
    ],
)
def test_bad_maps_are_one_line(folder, name, options, message):
    with pytest.raises(GainlensError, match=message) as caught:
        load_model(name or folder, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_nothing_reads_are_refused(folder):
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        gl.probe_gains(bridge_of(empty), TOKENS, progress=False)


def bridge_of(hf):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
