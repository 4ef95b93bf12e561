"""Healing maps behind a norm is training the slim model's own maps."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from releases import HAS_HOOKED
from slim_families import random_model
from test_slim_behind_norm import NORMED, logits, random_refit, random_slots

import gainlens as gl
from gainlens.ablation import RefitCut, SlotCut
from gainlens.cli.main import main
from gainlens.errors import FileFormatError, InputError
from gainlens.files import read_json
from gainlens.model.loading import load_hf
from gainlens.model.wrapping import to_bridge, to_hooked
from gainlens.training import train_virtual_width
from gainlens.training.student import Student

STEADY = dict(
    objective="next_token", batch=3, optimizer="sgd", lr=0.01, decay="constant", warmup=0,
    clip=None, progress=False,
)  # fmt: skip
TOKENS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(3))
CASES = [
    ("transformers", "qwen3"),
    ("transformers", "gemma3"),
    ("bridge", "gemma3"),
    *([("hooked", "qwen3")] if HAS_HOOKED else []),
]


def cut_of(hf, name, slots):
    return random_slots(hf, False) if slots else random_refit(hf, name)


def wide_model(name):
    """In float64: with float32, a step of these models' training is up to rounding alone."""
    return random_model(name).double()


def of_kind(kind, name):
    model = wide_model(name) if kind != "hooked" else random_model(name)
    if kind == "transformers":
        return model
    return {"bridge": to_bridge, "hooked": to_hooked}[kind](model, name, None)


def own_loop(thin, trained, steps):
    for parameter in thin.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(steps):
        found = thin(TOKENS, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        yield float(loss.detach())
        optimizer.step()


@pytest.mark.parametrize("slots", [False, True], ids=["refit", "slots"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_maps_train_as_those_of_the_slim_model(kind, name, slots):
    cut = cut_of(random_model(name), name, slots)
    thin = gl.slim(wide_model(name) if kind != "hooked" else random_model(name), cut)
    trained = [p for n, p in thin.named_parameters() if n.endswith("_map")]
    first = [p.detach().clone() for p in trained]
    losses = list(own_loop(thin, trained, 3))
    model = of_kind(kind, name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = train_virtual_width(model, cut, TOKENS, steps=3, **STEADY)
    assert [row["loss"] for row in run.curve[1:]] == pytest.approx(losses, abs=2e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    got = dict(gl.slim(model, run.plan).named_parameters())
    for key, parameter in thin.named_parameters():
        torch.testing.assert_close(got[key], parameter, rtol=0, atol=2e-5, msg=key)
    assert all(
        float((p - old).detach().abs().max()) > 1e-4 for p, old in zip(trained, first, strict=True)
    )


@pytest.mark.one_env
@pytest.mark.parametrize("name", NORMED)
def test_other_weights_train_beside_the_maps(name):
    """Values, outputs, MLPs and norms of the full-width model, as those of the slim one."""
    cut = random_refit(random_model(name), name)
    thin = gl.slim(wide_model(name), cut)
    kinds = ("_map", "v_proj.weight", "o_proj.weight")
    trained = [p for n, p in thin.named_parameters() if n.endswith(kinds) or ".mlp." in n]
    losses = list(own_loop(thin, trained, 1))
    model = wide_model(name)
    train = ("q", "k", "v", "o", "mlp")
    run = train_virtual_width(model, cut, TOKENS, steps=1, train=train, other_lr=0.01, **STEADY)
    assert [row["loss"] for row in run.curve[1:]] == pytest.approx(losses, abs=2e-5)
    torch.testing.assert_close(
        logits(gl.slim(model, run.plan), TOKENS), logits(thin, TOKENS), rtol=0, atol=1e-4
    )


@pytest.mark.one_env
@pytest.mark.parametrize("letter", ["q", "k"])
def test_a_letter_that_is_not_trained_stays(letter):
    hf = random_model("qwen3")
    cut = random_refit(hf, "qwen3")
    run = train_virtual_width(hf, cut, TOKENS, steps=2, train=(letter,), **STEADY)
    maps = {"q": (run.plan.maps.queries, cut.query_maps), "k": (run.plan.maps.keys, cut.key_maps)}
    for name, (new, old) in maps.items():
        assert torch.equal(new, old) == (name != letter)


@pytest.mark.one_env
def test_teacher_and_student():
    """The teacher is the model before the cut; the student computes what the slim model does."""
    hf = random_model("gemma3")
    cut = random_slots(hf, False)
    student = Student(hf, gl.SlicePlan.from_cut(cut))
    for model, intact in ((hf, True), (gl.slim(hf, cut), False)):
        found = logits(model, TOKENS)[:, :-1]
        wanted = torch.nn.functional.cross_entropy(
            found.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
        ).view(3, -1)
        got = student.token_losses(TOKENS, intact=intact)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.one_env
@pytest.mark.parametrize("slots", [False, True], ids=["refit", "slots"])
def test_a_saved_run(tmp_path, slots):
    hf = random_model("gemma3")
    run = train_virtual_width(hf, cut_of(hf, "gemma3", slots), TOKENS, steps=2, **STEADY)
    wanted = logits(gl.slim(hf, run.plan), TOKENS)
    run.save(tmp_path / "healed")
    cut = gl.load_cut(tmp_path / "healed" / "cut.safetensors")
    assert isinstance(cut, SlotCut if slots else RefitCut)
    model = load_hf(str(tmp_path / "healed"))
    torch.testing.assert_close(logits(gl.slim(model, cut), TOKENS), wanted, rtol=0, atol=1e-5)
    plan = gl.SlicePlan.load(tmp_path / "healed" / "plan.json")
    with pytest.raises(InputError, match="lost its maps"):
        gl.slim(model, plan)
    with pytest.raises(InputError, match="lost its maps"):
        train_virtual_width(model, plan, TOKENS, steps=1, **STEADY)


@pytest.mark.one_env
def test_a_killed_run_goes_on(tmp_path):
    cut = random_refit(random_model("qwen3"), "qwen3")
    settings = STEADY | {"decay": "linear", "optimizer": "adamw"}
    whole = train_virtual_width(random_model("qwen3"), cut, TOKENS, steps=4, **settings)
    file = tmp_path / "run.safetensors"

    class Killed(Exception):
        pass

    from gainlens.training.trainer import Trainer

    step = Trainer._save
    with pytest.MonkeyPatch.context() as patch:

        def once(self, path, number):
            step(self, path, number)
            if number == 2:
                raise Killed

        patch.setattr(Trainer, "_save", once)
        with pytest.raises(Killed):
            train_virtual_width(
                random_model("qwen3"), cut, TOKENS, steps=4, checkpoint=file, save_every=1,
                **settings,
            )  # fmt: skip
    run = train_virtual_width(
        random_model("qwen3"), cut, TOKENS, steps=4, checkpoint=file, save_every=1, **settings
    )
    assert torch.equal(run.plan.maps.queries, whole.plan.maps.queries)
    assert torch.equal(run.plan.maps.keys, whole.plan.maps.keys)


@pytest.mark.one_env
def test_in_rounds(tmp_path):
    """The second round goes on from the rows of the first that it keeps."""
    hf = random_model("qwen3")
    cut = random_refit(hf, "qwen3")
    first = gl.SlicePlan.from_cut(cut)
    keep = first.keep.clone()
    some = int(keep[0, 0, :8].nonzero()[0])
    if keep[0, 0].sum() > 2:
        keep[0, 0, [some, some + 8]] = False
    keep[1, 1] = first.keep[1, 1]
    second = replace(first, keep=keep, maps=None)
    settings = STEADY | {"lr": 1e-12}
    run = train_virtual_width(hf, [first, second], TOKENS, steps=2, **settings)
    kept = keep[..., None]
    torch.testing.assert_close(run.plan.maps.keys, cut.key_maps * kept, rtol=0, atol=1e-6)
    by_query = kept.repeat_interleave(2, 1)
    torch.testing.assert_close(run.plan.maps.queries, cut.query_maps * by_query, rtol=0, atol=1e-6)
    assert torch.equal(run.plan.keep, keep)
    gl.slim(hf, run.plan)


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """A small Qwen 3 that reads with the tokenizer of the small real model."""
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    tokenizer = gl.model.loading.load_tokenizer("tiny")
    config = transformers.Qwen3Config(
        vocab_size=load_hf("tiny").config.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.one_env
def test_from_the_command_line(readable, tmp_path, capsys):
    """Train, then make slim from the plan in the healed folder and from its cut: one model."""
    healed = tmp_path / "healed"
    text = ["--n-docs", "12", "--length", "48"]
    words = ["train", "--model", str(readable), *text, "--monitor", "2", "--judge", "4"]
    assert main([*words, "--steps", "2", "--out", str(healed)]) == 0
    facts = read_json(healed / "training.json")
    assert set(facts["untrained"]["validation"]) == {"cut", "cut and refitted"}
    assert "cut_file" in gl.SlicePlan.load(healed / "plan.json").facts
    made = {}
    for option, file in (("--plan", "plan.json"), ("--refit", "cut.safetensors")):
        out = tmp_path / option.strip("-")
        words = ["slim", "--model", str(healed), option, str(healed / file), "--judge", "0"]
        capsys.readouterr()
        assert main([*words, "--out", str(out)]) == 0
        assert "the maps after it add" in capsys.readouterr().out
        made[option] = gl.load_slim(out)
    tokens = torch.arange(4, 40)[None]
    wanted = logits(made["--plan"], tokens)
    assert torch.equal(logits(made["--refit"], tokens), wanted)
    bridge = gl.load_model(healed)
    cut = gl.load_cut(healed / "cut.safetensors")
    with gl.ablate(bridge, cut), torch.no_grad():
        torch.testing.assert_close(bridge(tokens), wanted, rtol=0, atol=1e-4)
    other = copy.deepcopy(cut)
    other.mask.keep[0, 0] = ~other.mask.keep[0, 0]
    gl.KeyMask(other.mask.keep, cut.all_facts).save(healed / "cut.safetensors")
    (healed / "SHA256SUMS").unlink()
    words = ["slim", "--model", str(healed), "--plan", str(healed / "plan.json"), "--judge", "0"]
    assert main([*words, "--out", str(tmp_path / "third")]) == 2
    assert "does not hold the maps" in capsys.readouterr().err
    (healed / "cut.safetensors").unlink()
    assert main([*words, "--out", str(tmp_path / "third")]) == 2
    assert "cut.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert issubclass(FileFormatError, Exception)


@pytest.mark.one_env
def test_slim_of_a_model_with_a_norm(readable, tmp_path, capsys):
    """``gainlens slim`` refits, keeps the maps and says what they take."""
    out = tmp_path / "slim"
    words = ["slim", "--model", str(readable), "--n-docs", "12", "--length", "48", "--judge", "2"]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "refitted" in said
    assert "projections stay whole" in said
    thin = gl.load_slim(out)
    # Two layers; four query and two key heads of 8, half of each kept at most by layer.
    assert sum(p.numel() for n, p in thin.named_parameters() if n.endswith("_map")) > 0
    words = [*words, "--engine", "transformers", "--scope", "universal"]
    assert main([*words, "--out", str(tmp_path / "stock")]) == 2
    assert "LlamaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "stock").exists()
