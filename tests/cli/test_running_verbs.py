"""``gainlens generate`` and ``gainlens evaluate`` on folders that ``slim`` wrote."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
import transformers
from calls import status_of

import gainlens as gl
from gainlens.export import SlicePlan, export_model, slim
from gainlens.model.loading import load_hf, load_tokenizer

pytestmark = pytest.mark.one_env


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny, tiny_calibration, tiny_gains):
    where = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer("tiny")
    own = slim(tiny, gl.KeyMask.quietest(tiny_gains, 0.5))
    export_model(own, where / "own", tokenizer=tokenizer)
    plan = SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="universal"), values=0.5)
    stock = slim(tiny, plan, tiny_calibration)
    export_model(stock, where / "stock", "transformers", tokenizer=tokenizer)
    return where


def said(capsys, *words):
    assert status_of([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["own", "stock"])
def test_generates_what_transformers_generates(name, folders, capsys):
    prompt = "The state of the union is"
    found = said(capsys, "generate", folders / name, prompt, "--max-new-tokens", "9")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / name)
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(9):  # greedy, by hand and without a cache
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert found["text"] == tokenizer.decode(ids[0, -9:], skip_special_tokens=True)


def test_sampling_follows_the_seed_and_leaves_torchs_generator_alone(folders, capsys):
    call = ["generate", folders / "own", "The", "--temperature", "1"]
    torch.manual_seed(3)
    first = said(capsys, *call, "--seed", "1")["text"]
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == after
    assert said(capsys, *call, "--seed", "1")["text"] == first
    assert said(capsys, *call, "--seed", "2")["text"] != first


def test_loss_of_each_text_beside_the_intact_model(folders, capsys):
    call = ["evaluate", folders / "own", "--original", "tiny", "--text", "sotu,pydoc"]
    found = said(capsys, *call, "--n-docs", "3", "--length", "40", "--margin", "0.5")
    thin, intact = gl.load_slim(folders / "own"), load_hf("tiny")
    assert list(found["texts"]) == ["sotu", "pydoc"]
    for name, row in found["texts"].items():
        tokens = gl.load_tokens(
            name, load_tokenizer("tiny"), n_docs=3, length=40, split="validation"
        )
        with torch.no_grad():
            losses = [float(model(tokens, labels=tokens).loss) for model in (thin, intact)]
        assert row["loss"] == pytest.approx(losses[0], abs=1e-5)
        assert row["verdict"]["estimate"] == pytest.approx(losses[0] - losses[1], abs=2e-5)
        assert row["verdict"]["margin"] == 0.5 and row["n_documents"] == 3


def test_tasks_of_a_folder_are_those_of_the_hooked_cut(folders, capsys, tiny):
    """The slim folder answers as the cut under hooks does; the intact model as the bridge."""
    words = ["--n-docs", "2", "--length", "24", "--prompts", "3", "--task-lengths", "120"]
    found = said(capsys, "evaluate", folders / "own", "--original", "tiny", *words)
    rows = found["prompts"]["rows"]
    assert {row["label"] for row in rows} == {"intact", "slim"} and len(rows) >= 4
    plan = gl.SlicePlan.load(folders / "own" / "slice_plan.json")
    names = list(dict.fromkeys(row["task"] for row in rows))
    wanted = gl.analysis.score_tasks(
        tiny, {"slim": plan.mask}, tasks=names, lengths=(120,), n=3, progress=False
    )
    for row, one in zip(rows, wanted.rows, strict=True):
        assert (row["task"], row["label"]) == (one.task, one.label)
        assert row["log_probability"] == pytest.approx(one.log_probability, abs=1e-3)
    assert found["skipped"] and all(why.startswith("task ") for why in found["skipped"])


def test_a_model_against_itself_does_not_rise(capsys):
    found = said(
        capsys, "evaluate", "tiny", "--original", "tiny", "--n-docs", "3", "--length", "24"
    )
    verdict = found["texts"]["sotu"]["verdict"]
    assert verdict["estimate"] == 0 and verdict["interval"] == [0, 0]


def test_tasks_go_through_the_harness_where_it_is_installed(folders, capsys, monkeypatch):
    """A stand-in for the package: what it is called with, and what is made of its answer."""
    asked = {}

    def simple_evaluate(model, tasks, limit):
        asked.update(model=model, tasks=tasks, limit=limit)
        return {"results": {"tasks_of_mine": {"acc,none": 0.25, "alias": "tasks_of_mine"}}}

    package = types.ModuleType("lm_eval")
    package.__spec__ = types.SimpleNamespace()
    package.simple_evaluate = simple_evaluate
    wrapper = types.ModuleType("lm_eval.models.huggingface")
    wrapper.HFLM = lambda pretrained, tokenizer: (pretrained, tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", wrapper)
    call = ["evaluate", folders / "own", "--n-docs", "2", "--length", "16", "--limit", "5"]
    found = said(capsys, *call, "--tasks", "tasks_of_mine")
    assert found["tasks"] == {"tasks_of_mine": {"acc,none": 0.25}}
    assert asked["tasks"] == ["tasks_of_mine"] and asked["limit"] == 5
    assert asked["model"][0].config.model_type.startswith("gainlens")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "{tmp}", "hello"], "no config.json"),
        (["generate", "tiny", "word " * 200], "fewer than the context of 128"),
        (["generate", "tiny", "a", "--device", "abacus"], "abacus"),
        (["generate", "{gguf}", "a"], "model.gguf alone"),
        (["evaluate", "{tmp}"], "no config.json"),
        (["evaluate", "tiny", "--n-docs", "5000"], "5000 wanted"),
        (["evaluate", "tiny", "--text", "stou"], "did you mean 'sotu'?"),
        (["evaluate", "tiny", "--tasks", "hellaswag"], "pip install lm-eval"),
        (["evaluate", "tiny", "--length", "4000"], "context"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, capsys):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")
    names = {"tmp": tmp_path, "gguf": tmp_path / "gguf"}
    assert status_of([word.format(**names) for word in words]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert said in error
