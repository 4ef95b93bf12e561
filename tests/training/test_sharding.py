"""Weights divided among two gloo processes: the same bytes as whole ones, and less memory."""

from __future__ import annotations

import pytest
import torch
from families import hugging_face
from test_processes import launch

import gainlens as gl
from gainlens.files import save_tensors
from gainlens.training import train_virtual_width
from gainlens.training.sharding import launched_sharded

pytestmark = pytest.mark.one_env

SCRIPT = """
import os, sys
from pathlib import Path
import torch
import gainlens as gl
from gainlens.files import load_tensors
from gainlens.model.loading import load_hf
from gainlens.training import Processes, TrainingError, train_virtual_width
from gainlens.training.trainer import Trainer

folder = Path(sys.argv[1])
tokens, _ = load_tensors(folder / "tokens.safetensors", "tokens")
plan = gl.SlicePlan.load(folder / "plan.json")
here = Processes.here()

def run(**more):
    model = load_hf("tiny")
    model.model.layers[1].mlp.up_proj.weight.data = (  # a view of a larger storage
        torch.cat([model.model.layers[1].mlp.up_proj.weight.data] * 2)[:341])
    settings = dict(
        steps=3, batch=3, tokens_per_batch=40, attention=0.3, check_every=2, progress=False)
    return train_virtual_width(
        model, plan, list(tokens["training"]), monitor=tokens["calibration"],
        **{**settings, **more})

for train in (("q", "k"), ("q", "v", "o", "norm")):
    found = {shard: run(train=train, shard=shard) for shard in (False, True)}
    plain, divided = (dict(found[shard].model.named_parameters()) for shard in (False, True))
    for name, weight in plain.items():
        assert torch.equal(weight, divided[name]), name
    assert found[False].curve == found[True].curve
    whole, part = (found[shard].facts["weight_bytes"] for shard in (False, True))
    own = sum(p.numel() * 4 for n, p in plain.items() if "layers" in n and (
        "mlp" in n or ("norm" in n and "norm" not in train)
        or ("v_proj" in n and "v" not in train) or ("o_proj" in n and "o" not in train)))
    view = 341 * 128 * 4  # which the weight that was a view of something larger no longer keeps
    assert abs((whole - part) - own / 2 - view) < 100, (whole, part, own)
    after = [found[shard].losses(tokens["validation"]) for shard in (False, True)]
    assert (after[0] == after[1]).all()
    hooks = [m for m in found[True].student.root.modules() if m._forward_pre_hooks]
    assert not hooks

try:
    run(lr=1e30, clip=None, warmup=0, optimizer="sgd", shard=True)
    raise SystemExit("should have raised")
except TrainingError:
    pass
os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate launch --use_fsdp says it
assert run().facts["weight_bytes"] == run(shard=True).facts["weight_bytes"]
(folder / f"done{here.rank}").touch()
"""


def test_two_processes_divide_the_weights(tmp_path, tiny_gains):
    model = gl.load_model("tiny")
    gl.SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer")).save(
        tmp_path / "plan.json"
    )
    tokens = {
        name: gl.load_tokens("sotu", model, n_docs=n, length=40, split=name)
        for name, n in (("training", 7), ("calibration", 3), ("validation", 3))
    }
    save_tensors(tmp_path / "tokens.safetensors", "tokens", tokens, {})
    launch(tmp_path, 2, SCRIPT)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_one_process_has_nothing_to_divide():
    model, other = hugging_face("LlamaForCausalLM"), hugging_face("LlamaForCausalLM")
    plan = gl.SlicePlan.identity(model)
    tokens = torch.arange(24).reshape(2, 12)
    runs = [
        train_virtual_width(m, plan, tokens, steps=2, shard=shard, progress=False)
        for m, shard in ((model, True), (other, False))
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert runs[0].facts["weight_bytes"] == runs[1].facts["weight_bytes"]


def test_a_model_that_only_its_own_code_runs_is_refused():
    from gainlens.model.wrapping import to_bridge

    model = to_bridge(hugging_face("GPT2LMHeadModel"), "gpt2", None)
    plan = gl.SlicePlan.identity(model)
    with pytest.raises(
        gl.errors.InputError, match="shard=True: GPT2LMHeadModel as .*can't be divided"
    ):
        train_virtual_width(model, plan, torch.arange(24).reshape(2, 12), steps=1, shard=True)


def test_as_accelerate_was_told(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not launched_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched_sharded()


def test_a_model_that_is_divided_already_is_refused():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = hugging_face("LlamaForCausalLM")
    plan = gl.SlicePlan.identity(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(gl.errors.InputError, match="divided among processes already .DTensor"):
            train_virtual_width(model, plan, torch.arange(24).reshape(2, 12), steps=1)
    finally:
        dist.destroy_process_group()
