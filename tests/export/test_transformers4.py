"""Stock folders under transformers 4, in an environment of its own (`make engines` makes it)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from slim_families import shape_of

from gainlens.export import SlicePlan, export_model, slim

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("GAINLENS_TRANSFORMERS4", ROOT / ".engines/transformers4/bin/python"))
TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))
READ = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
torch.save(logits, sys.argv[3])
"""
pytestmark = pytest.mark.one_env


def halved(hf):
    layers, heads, d_head = shape_of(hf)
    keep = torch.zeros(layers, heads, d_head, dtype=torch.bool)
    half, kept = d_head // 2, list(range(1, d_head // 2, 2))
    keep[..., kept] = keep[..., [half + k for k in kept]] = True
    return slim(hf, SlicePlan(keep, (2 * len(kept),) * layers), TOKENS)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama-3-rope", "llama-yarn", "qwen2"])
def test_keys_of_both_majors(originals, name, tmp_path):
    """What transformers 4 reads says the same frequencies as what transformers 5 reads."""
    folder = export_model(halved(originals[name]), tmp_path / "out", "transformers")
    config = json.loads((folder / "config.json").read_text())
    new, old = config["rope_parameters"], config["rope_scaling"]
    assert config["rope_theta"] == new["rope_theta"] == {**old, **new}["rope_theta"]
    assert {**old, "rope_theta": config["rope_theta"]} == new
    length = config["max_position_embeddings"]
    assert config["original_max_position_embeddings"] == length


@pytest.mark.skipif(
    not PYTHON.exists(),
    reason=f"no transformers 4 at {PYTHON}: make .engines/transformers4.stamp",
)
@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama-3-rope", "llama-yarn", "qwen2"])
def test_transformers_4_computes_the_same(originals, name, tmp_path):
    thin = halved(originals[name])
    folder = export_model(thin, tmp_path / "out", "transformers")
    command = [PYTHON, "-c", READ, folder, json.dumps(TOKENS.tolist()), tmp_path / "logits.pt"]
    run = subprocess.run(
        command, env={"PATH": "", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    with torch.no_grad():
        wanted = thin(TOKENS).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-4, rtol=0)
