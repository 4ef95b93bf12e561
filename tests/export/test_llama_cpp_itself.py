"""The gate in llama.cpp itself: against a stand-in, and in the engine where it is installed."""

from __future__ import annotations

import json

import pytest
import torch

import gainlens as gl
from gainlens.export.engines import llama_cpp_itself
from gainlens.model.loading import load_hf
from gainlens.model.zoo import smollm2

pytestmark = pytest.mark.one_env
STAND_IN = """
import json, os
class ggml_type: GGML_TYPE_F32 = 0
class llama_flash_attn_type: LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
class CommonParams:
    class model: path = ""
class Server:
    def __init__(self, settings):
        if not os.path.exists(os.environ["SAID"]):
            raise SystemExit("error: unknown model architecture")
    def handle_completions(self, request):
        steps = json.load(open(os.environ["SAID"]))
        content = [{"id": t, "logprob": p} for t, p in steps]
        return {"choices": [{"logprobs": {"content": content}}]}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package that says what the file ``said.json`` holds; without it, it loads nothing."""
    (tmp_path / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SAID", str(tmp_path / "said.json"))
    return tmp_path / "said.json"


def greedy(model) -> list[tuple[int, float]]:
    """The right answer, by transformers' own generation."""
    generator = torch.Generator().manual_seed(2)
    vocabulary, length = int(model.config.vocab_size), llama_cpp_itself.PROMPT
    prompt = torch.randint(0, vocabulary, (length,), generator=generator)[None]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
        max_new_tokens=llama_cpp_itself.NEW, min_new_tokens=llama_cpp_itself.NEW,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    tokens = out.sequences[0, length:].tolist()
    return [
        (token, float(logits[0].double().log_softmax(-1)[token]))
        for token, logits in zip(tokens, out.logits, strict=True)
    ]


def test_the_same_greedy_tokens_pass_and_others_do_not(stand_in, tmp_path):
    model = load_hf("tiny")
    steps = greedy(model)
    stand_in.write_text(json.dumps(steps))
    assert llama_cpp_itself.fault(tmp_path / "model.gguf", model, "f32") is None
    token, logprob = steps[3]
    stand_in.write_text(json.dumps([*steps[:3], (token, logprob + 0.01), *steps[4:]]))
    said = llama_cpp_itself.fault(tmp_path / "model.gguf", model, "f32")
    assert said is not None and f"gives token {token} the log-probability" in said
    assert llama_cpp_itself.fault(tmp_path / "model.gguf", model, "f16") is None


def test_a_build_that_does_not_know_the_architecture_is_one_line(stand_in, tmp_path):
    said = llama_cpp_itself.fault(tmp_path / "model.gguf", load_hf("tiny"), "f32")
    assert said == "llama.cpp does not run it: error: unknown model architecture"


def test_a_fault_writes_nothing(monkeypatch, tmp_path):
    thin = gl.slim(load_hf("tiny"), gl.SlicePlan.identity(load_hf("tiny")))
    engine = gl.export.engines.ENGINES["llama.cpp"]
    monkeypatch.setattr(type(engine), "fault", lambda *_: "llama.cpp does not run it: too old")
    with pytest.raises(gl.export.ParityError, match="too old; nothing was written"):
        gl.export_model(thin, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp_itself.installed(), reason="xllamacpp is not installed")
def test_llama_cpp_runs_what_is_written(tmp_path):
    model = load_hf("smollm2")
    keep = torch.zeros(30, 3, 64, dtype=torch.bool)
    keep[..., :16] = keep[..., 32:48] = True
    thin = gl.slim(model, gl.KeyMask(keep))
    folder = gl.export_model(thin, tmp_path / "out", "llama.cpp", tokenizer=smollm2.packaged_gguf())
    assert (folder / "model.gguf").exists()
    assert llama_cpp_itself.fault(folder / "model.gguf", model, "f32") is not None, "intact"
