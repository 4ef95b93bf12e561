"""The vLLM plug-in, imported from its folder; what is tested here needs no vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "plugins/vllm", ROOT / "tests/export"):
    sys.path.insert(0, str(folder))

from gainlens_vllm.families import REFUSED
from slim_families import CONFIGS, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.export import canonical_plan

NOT_SERVED = {config_class for config_class, _ in REFUSED.values()}
SERVED = [name for name, row in CONFIGS.items() if type(row[0]()).__name__ not in NOT_SERVED]


@pytest.fixture(scope="session", params=[*SERVED, "gpt2 canonical", "llama values"])
def served(request, tmp_path_factory):
    """Name, slim model and folder of each family, heads ragged."""
    name, _, kind = request.param.partition(" ")
    model = random_model(name)
    cut = gl.KeyMask(random_keep(shape_of(model), CONFIGS[name][1]))
    if kind == "canonical":
        cut = canonical_plan(model, 0.5)
    elif kind == "values":
        cut = gl.SlicePlan.from_cut(cut, values=0.5)
    return request.param, *_written(model, cut, tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Model, slim model and folder of a Llama."""
    model = random_model("llama")
    keep = random_keep(shape_of(model), 16)
    return model, *_written(model, gl.KeyMask(keep), tmp_path_factory)


@pytest.fixture(scope="session")
def slots(tmp_path_factory):
    """Slim model and folder of a Llama whose heads turn by frequencies of the plan."""
    model = random_model("llama")
    keep = random_keep(shape_of(model), 16, ragged=False)
    frequencies = torch.rand(3, 2, 8, dtype=torch.float64)
    plan = gl.SlicePlan(keep, frequencies=frequencies)
    return _written(model, plan, tmp_path_factory)


def _written(model, plan, tmp_path_factory):
    slim = gl.slim(model, plan, torch.randint(0, 96, (4, 32)))
    folder = tmp_path_factory.mktemp("folders") / "slim"
    gl.export_model(slim, folder)
    return slim, folder
