"""The parser: one vocabulary, help that says everything, and hints before anything is loaded."""

from __future__ import annotations

import shlex

import pytest
from calls import status_of

from gainlens.ablation.key_mask import SCOPES
from gainlens.ablation.modes import MODES
from gainlens.cli.parser import build_parser
from gainlens.cli.verbs import COMMANDS
from gainlens.cli.verbs.common import OPTIONS, next_line, shown
from gainlens.export import ENGINES
from gainlens.probes.gains import UNITS
from gainlens.probes.scores import SCORES

pytestmark = pytest.mark.one_env
TABLES = {
    "scope": SCOPES,
    "unit": UNITS,
    "score": SCORES,
    "mode": [name for name in MODES if name != "patch"],
    "engine": ENGINES,
}


def parsers():
    return build_parser().parse_args(["probe"]).parsers


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_has_every_default_and_an_example_that_parses(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert status_of([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for action in parsers()[verb]._actions:
        if action.default is None or isinstance(action.default, bool) or action.dest == "help":
            continue
        value = f"{{{','.join(action.choices)}}}" if action.choices else action.dest.upper()
        _, _, about = text.partition(f" {action.option_strings[-1]} {value} ")
        assert about.partition(" (default: ")[2].startswith(f"{shown(action.default)})"), action
    examples = COMMANDS[verb].EXAMPLES
    assert examples
    for command in examples:
        assert " ".join(command.split()) in text
        words = shlex.split(command)
        assert words[:2] == ["gainlens", verb]
        build_parser().parse_args(words[1:])


@pytest.mark.parametrize("name", TABLES)
def test_choices_come_from_the_tables(name):
    found = [a for p in parsers().values() for a in p._actions if a.dest == name]
    assert found
    for action in found:
        assert list(action.choices) == list(TABLES[name])


def test_shared_options_stand_in_one_order_with_one_meaning():
    order = list(OPTIONS)
    for verb, parser in parsers().items():
        names = [a.dest for a in parser._actions if a.dest in ("model", "text", "n_docs", "length")]
        assert names == sorted(names, key=order.index), verb
        assert not {"keep", "units", "values"} & {a.dest for a in parser._actions}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["surgery", "--scope", "heads"], "did you mean 'head'?"),
        (["map", "--score", "kq"], "did you mean 'qk'?"),
        (["slim", "--engine", "lama.cpp"], "did you mean 'llama.cpp'?"),
        (["probe", "--scores", "rms,kq"], "did you mean 'qk'?"),
        (["train", "--fraction", "50"], "did you mean 0.5?"),
        (["report", "--fractions", "0.25,80"], "did you mean 0.8?"),
        (["slim", "--keep", "0.5"], "did you mean --fraction"),
        (["surgery", "--gain", "x"], "did you mean --gains?"),
        (["surgery", "--n-docs", "many"], "expected a whole number"),
    ],
)
def test_a_misspelt_word_is_one_line_with_the_right_one(words, hint, capsys):
    assert status_of(words) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [v for v in COMMANDS if v not in ("generate", "evaluate", "bench")]
)
def test_too_few_documents_are_known_before_a_model_loads(verb, tmp_path, monkeypatch, capsys):
    import gainlens.training.healing
    from gainlens.cli.verbs import common

    for module in (common, gainlens.training.healing):
        monkeypatch.setattr(module, "load_model", None)  # would be a TypeError
    (tmp_path / "text").mkdir()
    (tmp_path / "text/one.txt").write_text("one document")
    for text in ("sotu", tmp_path / "text"):
        out = tmp_path / "out"
        assert status_of([verb, "--text", text, "--n-docs", "2000", "--out", out]) == 2
        error = capsys.readouterr().err
        assert "wanted" in error and error.count("\n") == 1
        assert not out.exists()


def test_one_text_file_is_one_document_and_the_error_says_what_to_give(tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("## one\n## two\n" * 50)
    assert status_of(["surgery", "--model", "tiny", "--text", notes]) == 2
    error = capsys.readouterr().err
    assert "(1 in all)" in error and error.count("\n") == 1
    assert ".jsonl" in error and "separator=" in error and "--judge" not in error


def test_next_line_keeps_what_the_user_gave():
    given = ["--model", "a b", "--text", "pydoc", "--n-docs", "5", "--length", "32", "--seed", "7"]
    options = build_parser().parse_args(["probe", *given, "--device", "cuda", "--out", "g"])
    line = next_line(options, "surgery", gains="g")
    words = shlex.split(line.removeprefix("next: "))
    again = build_parser().parse_args(words[1:])
    assert (again.model, again.text, again.n_docs, again.length) == ("a b", "pydoc", 5, 32)
    assert (again.seed, again.device, again.gains) == (7, "cuda", "g")
    assert again.out == "surgery.json" and again.score == "qk"
