"""What lies in an exported folder besides weights: card, tokenizer, code, and whose code runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from slim_families import random_keep, shape_of

import gainlens as gl
from gainlens.errors import FileFormatError, InputError
from gainlens.export import ENGINES, SlicePlan, export_model, load_slim, slim
from gainlens.model.loading import load_hf, load_tokenizer
from gainlens.stats.verdicts import Verdict

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def thin(originals):
    hf = originals["llama"]
    return slim(hf, SlicePlan(random_keep(shape_of(hf), 16), facts={"score": "fisher"}))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


TRUSTED = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "gainlens" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__ == "gainlens.export.modeling", type(model)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""
ABSENT = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gainlens":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""


def python(code, *arguments, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[2],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_code_on_the_readers_word(thin, tmp_path):
    """Without importing gainlens first; what is saved again is such a folder too."""
    folder = export_model(thin, tmp_path / "out")
    torch.save(TOKENS, tmp_path / "x.pt")
    python(TRUSTED, folder, tmp_path / "x.pt", tmp_path / "again", tmp_path=tmp_path)
    assert torch.equal(torch.load(tmp_path / "x.pt"), logits(thin))
    again = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert "modeling_gainlens.py" in again
    assert "modeling.py" not in again
    settings = json.loads((tmp_path / "again/config.json").read_text())
    assert settings["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert torch.equal(logits(load_slim(tmp_path / "again")), logits(thin))


def test_without_gainlens_the_reader_is_told(thin, tmp_path):
    folder = export_model(thin, tmp_path / "out")
    said = python(ABSENT, folder, tmp_path=tmp_path)
    assert "pip install gainlens" in said


def test_code_of_a_folder_is_never_run_or_asked_for(thin, tmp_path, monkeypatch):
    """A folder with code of its own, for every way of ours to open one; nobody is asked."""

    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    monkeypatch.setattr(sys, "stdin", None)
    folder = tmp_path / "hostile"
    thin.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    for model_type, name in (("own", "EvilForCausalLM"), (settings["model_type"], "SlimLlama")):
        changed = {**settings, "auto_map": classes, "model_type": model_type}
        changed["architectures"] = [name]
        (folder / "config.json").write_text(json.dumps(changed))
        for opened in (
            lambda: load_slim(folder),
            lambda: gl.load_model(folder),
            lambda: load_hf(folder),
            lambda: load_tokenizer(folder),
            lambda: load_slim(folder, trust_remote_code=True),
            *(lambda row=row: row.read_back(folder) for row in ENGINES.values()),
        ):
            with suppress(Exception):
                opened()
            assert not asked
            assert not (tmp_path / "ran").exists()
    with pytest.raises(FileFormatError, match="can't be read as a slim model"):
        (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own"}))
        load_slim(folder)


def test_every_opening_says_that_no_code_is_run():
    package = Path(gl.__file__).parent
    silent = []
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", None)
            if not isinstance(node, ast.Call) or name != "from_pretrained":
                continue
            said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            spread = None in said  # load_slim's settings, which the test above opens with
            if said.get("trust_remote_code", True) is not False and not spread:
                silent.append(f"{file.relative_to(package)}:{node.lineno}")
    assert silent == []


def test_the_card(thin, tmp_path):
    verdict = Verdict("holds", "the loss rises by at most 0.02", 0.011, (0.004, 0.018), 0.02, 40)
    folder = export_model(
        thin, tmp_path / "my-slim", verdict=verdict, command="gainlens slim --keep 0.5"
    )
    card = (folder / "README.md").read_text()
    kept = f"{thin.config.gainlens['plan']['shape'][2]} per head"
    for part in (
        "library_name: gainlens", "# my-slim", kept, f"{thin.num_parameters():,}", "score: fisher",
        "holds: 0.011 [0.004, 0.018] against a margin of 0.02, on 40 documents",
        "gainlens slim --keep 0.5", "trust_remote_code=True", "to",
    ):  # fmt: skip
        assert part in card, part
    widths = [m.head_dim for m in thin.modules() if hasattr(m, "value_dim")]
    before, after = 3 * 2 * 2 * 16 * 2, 2 * 2 * sum(w + 16 for w in widths)
    assert f"{before:,} to {after:,} bytes per token" in card
    bare = (export_model(thin, tmp_path / "bare") / "README.md").read_text()
    assert "nothing is claimed" in bare
    with pytest.raises(InputError, match="expected a gainlens Verdict"):
        export_model(thin, tmp_path / "out", verdict="holds")


def test_cards_of_stock_engines(originals, tmp_path):
    hf = originals["llama"]
    keep = torch.zeros(3, 2, 16, dtype=torch.bool)
    keep[..., [0, 3, 8, 11]] = True
    thin = slim(hf, SlicePlan(keep))
    card = (export_model(thin, tmp_path / "t", "transformers") / "README.md").read_text()
    assert "neither transformers 4 nor vLLM" in card
    card = (export_model(thin, tmp_path / "l", "llama.cpp") / "README.md").read_text()
    assert "llama-server -m l/model.gguf" in card
    assert "step35" in card


def test_tokenizer_template_and_settings_go_along(tiny, tmp_path):
    """Of the model that was cut, unless another is passed; nowhere in silence."""
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny.cfg.d_vocab)}, "t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    hf = load_hf("tiny")
    hf.generation_config.repetition_penalty = 1.25
    hf.tokenizer = tokenizer
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = export_model(thin, tmp_path / "out")
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == tokenizer.chat_template
    assert read("t7 t9").input_ids == tokenizer("t7 t9").input_ids
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.repetition_penalty == 1.25
    del hf.tokenizer
    bare = slim(hf, SlicePlan(random_keep(shape_of(hf), 32)))
    for engine, wanted in (("gainlens", "the original's"), ("llama.cpp", "a GGUF file")):
        keep = torch.ones(shape_of(hf), dtype=torch.bool)
        model = bare if engine == "gainlens" else slim(hf, SlicePlan(keep))
        with pytest.warns(UserWarning, match=f"gets no tokenizer: pass tokenizer= .{wanted}"):
            export_model(model, tmp_path / engine, engine)


def test_a_card_tells_how_it_was_chosen_and_no_hashes(originals, tmp_path):
    hf, digest = originals["llama"], "9f" * 32
    facts = {
        "score": "fisher", "fingerprint": None, "documents": ["62:03wg"], "texts": [digest],
        "refit": {"method": "least squares", "ridge": [0.01, 0.1], "fingerprint": digest},
        "trained": {"steps": 280, "train": ["q", "k"], "clip": None, "lr": 0.001},
    }  # fmt: skip
    thin = slim(hf, SlicePlan(random_keep(shape_of(hf), 16), facts=facts))
    said = (export_model(thin, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "- score: fisher" in said
    assert "- refit: method least squares; ridge 0.01, 0.1\n" in said
    assert "- trained: steps 280; train q, k; lr 0.001\n" in said
    assert digest not in said and "62:03wg" not in said
