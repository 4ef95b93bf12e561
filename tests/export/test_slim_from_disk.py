"""``slim`` of a model whose weights stay on disk writes the bytes that it writes in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sharded import sharded_tiny
from slim_families import CONFIGS, random_keep, shape_of

import gainlens as gl
from gainlens.errors import FileFormatError
from gainlens.export.engines import EngineLimitError, own
from gainlens.export.speed_ledger import sizes
from gainlens.model.loading import load_hf, load_model
from gainlens.model.stored_weights import StoredWeights, is_offloaded

pytest.importorskip("accelerate")
pytestmark = pytest.mark.one_env  # refused on transformer-lens 3

TOKENS = torch.randint(0, 1024, (2, 24), generator=torch.Generator().manual_seed(1))
TWO = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sharded_tiny(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def cuts(whole):
    gains = gl.probe_gains(whole, TOKENS, scores=("qk",), progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5, "qk")
    n, kv, d = mask.shape
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(n, kv, d, d, generator=generator) * 0.2 + torch.eye(d)
    queries = torch.randn(n, 2 * kv, d, d, generator=generator) * 0.2 + torch.eye(d)
    keys, queries = (
        m * keep[..., None] * turning(d)
        for m, keep in ((keys, mask.keep), (queries, mask.keep.repeat_interleave(2, 1)))
    )
    return {"mask": mask, "refit": gl.RefitCut(mask, queries, keys)}


def turning(d):
    """Zero but where dimensions of one rotary pair meet, so that any maps are lawful."""
    return (torch.arange(d)[:, None] % (d // 2) == torch.arange(d) % (d // 2)).float()


def written(model, cut, folder, **options):
    thin = gl.slim(model, cut)
    return thin, gl.export_model(thin, folder, **options)


@pytest.mark.parametrize("kind", ["mask", "refit"])
@pytest.mark.parametrize("place", ["disk", TWO], ids=["disk", "cpu and disk"])
@pytest.mark.parametrize("direct", [False, True], ids=["bridge", "transformers"])
def test_equal_bytes(folder, whole, cuts, tmp_path, kind, place, direct):
    load = load_hf if direct else load_model
    model = load(folder, device_map=place)
    thin, here = written(model, cuts[kind], tmp_path / "a" / "slim")
    wanted, there = written(
        load_hf(folder) if direct else whole, cuts[kind], tmp_path / "b" / "slim"
    )
    assert is_offloaded(thin)
    assert all(p.is_meta for p in thin.parameters())
    assert sorted(f.name for f in here.iterdir()) == sorted(f.name for f in there.iterdir())
    differ = [f.name for f in here.iterdir() if f.read_bytes() != (there / f.name).read_bytes()]
    assert differ == []
    assert sizes(thin) == sizes(wanted)
    assert thin.gainlens_parity.difference == pytest.approx(wanted.gainlens_parity.difference)


def test_shards_of_a_lower_precision(folder, whole, cuts, tmp_path, monkeypatch):
    """Several files, read back from memory and from disk."""
    monkeypatch.setattr(own, "SHARD", "500KB")
    model = load_model(folder, device_map="disk")
    _, here = written(model, cuts["refit"], tmp_path / "here", precision="bf16")
    _, there = written(whole, cuts["refit"], tmp_path / "there", precision="bf16")
    files = sorted(here.glob("*.safetensors"))
    assert len(files) > 2
    assert max(f.stat().st_size for f in files) < 600_000
    found = {name: tensor for f in files for name, tensor in load_file(f).items()}
    wanted = load_file(there / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((here / "config.json").read_text())["dtype"] == "bfloat16"
    again = gl.load_slim(here, dtype=torch.float32)
    streamed = gl.load_slim(here, dtype=torch.float32, device_map="disk")
    assert is_offloaded(streamed)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, streamed(TOKENS).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, originals, tmp_path):
    """Of transformers' model, which a bridge can't wrap in every family."""
    original = originals[name]
    original.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    keep = random_keep(shape_of(original), CONFIGS[name][1])
    models = (load_hf(tmp_path / "model", device_map=m) for m in ("disk", None))
    thin, wanted = (gl.slim(model, gl.KeyMask(keep)) for model in models)
    found = StoredWeights(thin)
    assert found.elsewhere
    for weight, tensor in wanted.named_parameters():
        assert torch.equal(found[weight], tensor), weight


def test_a_slim_model_on_disk_is_written_again(folder, cuts, tmp_path):
    """``load_slim`` from disk, and out once more."""
    model = load_model(folder, device_map="disk")
    _, first = written(model, cuts["mask"], tmp_path / "first")
    second = gl.export_model(gl.load_slim(first, device_map="disk"), tmp_path / "second")
    file = "model.safetensors"
    assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_an_engine_that_writes_from_memory_refuses_before_anything(folder, cuts, tmp_path, engine):
    mask = gl.KeyMask(cuts["mask"].keep[:1, :1].expand(cuts["mask"].shape).clone())
    thin = gl.slim(load_model(folder, device_map="disk"), mask)
    with pytest.raises(EngineLimitError, match="from memory") as caught:
        gl.export_model(thin, tmp_path / "out", engine)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_original_goes_away(folder, cuts, tmp_path):
    """A slim model that is not in memory needs it: one line, and nothing half-written."""
    where = tmp_path / "going"
    shutil.copytree(folder, where)
    thin = gl.slim(load_model(where, device_map="disk"), cuts["mask"])
    next(where.glob("*-00003-*")).unlink()
    with pytest.raises((FileFormatError, gl.errors.InputError)) as caught:
        gl.export_model(thin, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
