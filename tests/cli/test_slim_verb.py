"""``gainlens slim`` from end to end on the small real model."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
import transformers
from calls import status_of

import gainlens as gl
from gainlens.export import SlicePlan, plan_of, slim
from gainlens.export.judging import document_losses
from gainlens.export.recipe import refitted
from gainlens.files import sealed, write_json
from gainlens.model.loading import load_hf

TEXT = ["--model", "tiny", "--n-docs", "6", "--length", "64", "--judge", "4"]


def run(capsys, *arguments):
    status = status_of(["slim", *TEXT, "--json", *arguments])
    return status, capsys.readouterr()


def done(capsys, *arguments):
    status, captured = run(capsys, *arguments)
    assert status == 0, captured.err
    return json.loads(captured.out)


def refused(capsys, *arguments):
    status, captured = run(capsys, *arguments)
    assert status == 2
    return captured.err


def test_half_of_the_keys_then_three_lines_of_transformers(tmp_path, capsys, tiny):
    found = done(capsys, "--scope", "head", "--out", tmp_path / "slim")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    tokens = gl.load_tokens("sotu", tiny, n_docs=1, length=8, split="validation")
    assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape[1] == 12
    assert found["slim"]["key_bytes"] * 2 == found["full"]["key_bytes"]
    text = gl.load_tokens("sotu", tiny, n_docs=4, length=64, split="validation")
    with torch.no_grad():
        rise = model(text, labels=text).loss - tiny(text, return_type="loss")
    assert found["verdict"]["estimate"] == pytest.approx(float(rise), abs=2e-5)
    assert found["verdict"]["n_documents"] == 4 and found["verdict"]["margin"] == 0.02
    assert found["refit"]["misfit_after"] < found["refit"]["misfit_before"]
    assert plan_of(model.config) == SlicePlan.load(tmp_path / "slim/slice_plan.json")


def test_refit_stays_closer_to_the_original(tiny, tiny_validation):
    """In nats of Kullback-Leibler divergence: this model's own loss hardly feels the cut."""
    tokens = gl.load_tokens("sotu", tiny, n_docs=32, length=120, split="calibration")
    cut = gl.best_cut(tiny, tokens, 0.5, "head", progress=False)
    plain = gl.best_cut(tiny, tokens, 0.5, "head", rounds=0, progress=False)
    assert torch.equal(plain.keep, cut.keep)
    assert plain.maps is None

    def away(thin):
        with torch.no_grad():
            got, wanted = (m.log_softmax(-1) for m in (thin.logits, tiny(tiny_validation)))
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    with torch.no_grad():
        fitted, zeroed = (away(slim(tiny, one)(tiny_validation)) for one in (cut, plain))
    assert fitted < 0.8 * zeroed


def test_loss_is_the_models_own(tiny, tiny_validation):
    identity = slim(tiny, SlicePlan.identity(tiny))
    with torch.no_grad():
        wanted = float(tiny(tiny_validation, return_type="loss"))
    assert abs(document_losses(identity, tiny_validation).mean() - wanted) < 1e-4


def test_a_refit_behind_a_norm(originals):
    from gainlens.model.wrapping import to_bridge

    bridge = to_bridge(copy.deepcopy(originals["qwen3"]), "qwen3", None)
    tokens = torch.randint(3, 96, (16, 64))
    cut = gl.best_cut(bridge, tokens, 0.5, "head", score="qk", rounds=0, progress=False)
    plan = refitted(bridge, tokens, SlicePlan.from_cut(cut), progress=False)
    fitted = gl.ablation.refit(bridge, tokens, cut, progress=False)
    assert torch.equal(plan.maps.queries, fitted.query_maps)
    with torch.no_grad():
        wanted = bridge.run_with_hooks(tokens[:2], fwd_hooks=fitted.hooks(bridge))
        torch.testing.assert_close(slim(bridge, plan)(tokens[:2]).logits, wanted, atol=1e-4, rtol=0)


def test_a_healed_checkpoint_and_the_plan_beside_it(tmp_path, capsys, tiny_gains):
    """Healing leaves full-width weights with another fingerprint than the plan's."""
    healed = load_hf("tiny")
    gl.model.loading.load_tokenizer("tiny").save_pretrained(tmp_path / "healed")
    plan = SlicePlan.from_cut(gl.KeyMask.quietest(tiny_gains, 0.5, scope="layer"))
    with torch.no_grad():
        for layer in healed.model.layers:
            layer.self_attn.k_proj.weight.mul_(1.25)
    healed.save_pretrained(tmp_path / "healed")
    plan.save(tmp_path / "healed/plan.json")
    plan.save(tmp_path / "elsewhere.json")
    where = ["--model", tmp_path / "healed", "--out", tmp_path / "slim", "--plan"]
    assert "made for another model" in refused(capsys, *where, tmp_path / "elsewhere.json")
    done(capsys, *where, tmp_path / "healed/plan.json")
    thin = gl.load_slim(tmp_path / "slim")
    assert torch.equal(plan_of(thin.config).keep, plan.keep)
    bridge = gl.load_model(tmp_path / "healed")
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        wanted = bridge.run_with_hooks(tokens, fwd_hooks=gl.ablation_hooks(bridge, plan.mask))
        torch.testing.assert_close(thin(tokens).logits, wanted, atol=1e-4, rtol=0)


def test_a_refit_from_a_file(tmp_path, capsys, tiny, tiny_calibration, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    cut = gl.ablation.refit(tiny, tiny_calibration, mask, rounds=1, progress=False)
    cut.save(tmp_path / "refit.safetensors")
    done(capsys, "--refit", tmp_path / "refit.safetensors", "--out", tmp_path / "slim")
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        wanted = slim(tiny, cut)(tokens).logits
        got = gl.load_slim(tmp_path / "slim")(tokens).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_bad_input_leaves_nothing(tmp_path, capsys, tiny_gains):
    out = tmp_path / "out"
    assert "--engine: 'tgi' is not one of" in refused(capsys, "--out", out, "--engine", "tgi")
    assert "expected one of them" in refused(capsys, "--plan", "a", "--refit", "b", "--out", out)
    assert "--fraction" in refused(capsys, "--fraction", "1", "--out", out)
    half = tiny_gains.score("qk") > 0
    half[..., 3] = False
    SlicePlan(half).save(tmp_path / "half.json")
    assert "rotary pairs" in refused(capsys, "--plan", tmp_path / "half.json", "--out", out)
    document = SlicePlan(torch.ones(4, 2, 32, dtype=torch.bool)).to_json()
    document["keep"][1][0] = []
    for name in ("format", "kind", "checksum"):
        del document[name]
    write_json(tmp_path / "empty.json", sealed("slice_plan", document))
    assert "key head 0 of layer 1 no dimension" in refused(
        capsys, "--plan", tmp_path / "empty.json", "--out", out
    )
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "already holds something" in refused(capsys, "--out", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_refused_before_a_model_is_probed(tmp_path, capsys, monkeypatch):
    """What can be known beforehand costs no minutes and makes no folder."""
    from gainlens.cli.verbs import slim as command

    monkeypatch.setattr(command, "ranking_gains", None)
    monkeypatch.setattr(command, "best_cut", None)
    out = tmp_path / "deep/er/out"
    assert "--precision: 'q4' is not" in refused(capsys, "--out", out, "--precision", "q4")
    with monkeypatch.context() as patched:
        patched.setattr(command, "open_model", None)  # would be a TypeError
        message = refused(capsys, "--out", out, "--precision", "q8_0")
        assert "--precision q8_0: --engine gainlens writes f32, f16, bf16" in message
        assert "did you mean 0.5?" in refused(capsys, "--out", out, "--fraction", "50")
        assert "did you mean --fraction" in refused(capsys, "--out", out, "--keep", "0.5")
        assert "did you mean 'head'?" in refused(capsys, "--out", out, "--scope", "heads")
        assert "2000 wanted" in refused(capsys, "--out", out, "--n-docs", "2000")
        assert "--judge 1" in refused(capsys, "--out", out, "--judge", "1")
        assert "gone.json" in refused(capsys, "--out", out, "--plan", tmp_path / "gone.json")
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        message = refused(capsys, "--out", out, "--engine", "llama.cpp", "--precision", "f16")
        assert "--engine llama.cpp needs: pip install gguf" in message
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    where = ["--model", tmp_path / "experts", "--judge", "0"]
    assert "MixtralForCausalLM can't be made slim" in refused(capsys, *where, "--out", out)
    assert [p.name for p in tmp_path.iterdir()] == ["experts"]


def test_an_engine_refuses_a_plan_before_it_is_refitted(tmp_path, capsys, monkeypatch):
    from gainlens.cli.verbs import slim as command

    monkeypatch.setattr(command, "best_cut", None)
    message = refused(
        capsys, "--out", tmp_path / "out", "--engine", "transformers", "--scope", "head"
    )
    assert "one set of rotary pairs" in message
    assert "nearest plan" in message
    assert "--scope universal --fraction 0.5" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existed", [True, False])
def test_a_disk_that_is_full_at_the_last_file(tmp_path, capsys, monkeypatch, existed):
    def full(self, path):
        raise gl.errors.InputError(f"{path} can't be written: No space left on device")

    monkeypatch.setattr(SlicePlan, "save", full)
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    assert "No space left" in refused(capsys, "--out", out, "--refit-rounds", "0")
    assert list(tmp_path.rglob("*")) == ([out] if existed else [])


def test_the_canonical_basis_of_a_model_without_rotation(tmp_path, capsys, originals):
    originals["gpt2"].save_pretrained(tmp_path / "gpt2")
    where = ["--model", tmp_path / "gpt2", "--judge", "0", "--basis", "canonical"]
    where += ["--scope", "head"]
    found = done(capsys, *where, "--fraction", "0.75", "--out", tmp_path / "slim")
    assert found["slim"]["key_bytes"] * 4 == found["full"]["key_bytes"]
    plan = plan_of(gl.load_slim(tmp_path / "slim").config)
    assert plan.basis == "canonical"
    assert plan == gl.export.canonical_plan(originals["gpt2"], 0.75)
    message = refused(capsys, "--basis", "canonical", "--judge", "0", "--out", tmp_path / "no")
    assert "rotates its keys" in message


def test_a_gguf_without_a_vocabulary_says_so_and_takes_a_given_one(tmp_path, capsys):
    """The small model's own vocabulary is in no GGUF file, so one is made here."""
    import gguf

    file = tmp_path / "original.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{n}" for n in range(1024)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    call = ["--engine", "llama.cpp", "--judge", "0", "--refit-rounds", "0"]
    bare = done(capsys, *call, "--out", tmp_path / "bare")
    assert not bare["vocabulary"]
    assert "no vocabulary was written" in bare["lines"][-1]
    assert "--tokenizer" in bare["lines"][-1]
    whole = done(capsys, *call, "--tokenizer", file, "--out", tmp_path / "whole")
    assert whole["vocabulary"] and "warning" not in whole["lines"][-1]
    fields = gguf.GGUFReader(str(tmp_path / "whole/model.gguf")).fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 1024
    message = refused(capsys, *call, "--tokenizer", tmp_path / "gone", "--out", tmp_path / "no")
    assert "gone" in message and not (tmp_path / "no").exists()
