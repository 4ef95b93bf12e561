"""The shell commands of the README and the site run as printed, and so do the ``next:`` lines.

The small model stands in for SmolLM2 and for a folder of one's own; commands run one after the
other in one folder per page, as a reader would run them. A block that a comment marks with
``<!-- not run: why -->`` is parsed and no more, and so are ``make``, ``pip`` and ``python``.
"""

from __future__ import annotations

import json
import shlex

import pytest
from test_blocks import PAGES, blocks

from gainlens.cli.main import main
from gainlens.data.sources import documents

pytestmark = pytest.mark.one_env

STAND_INS = {"smollm2": "tiny", "my_checkpoint": "tiny"}
"""Models of the text, and what runs in their place."""
FEW = {"--steps": "2", "--permutations": "50"}
"""Counts that only cost time; every other option is as printed."""


def commands(page):
    for block in blocks(page, "sh"):
        if block["marker"] == "not run":
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and "=" in words[0]:
                words = words[1:]  # settings of the environment
            if words and words[0] == "gainlens":
                yield words[1:]


def on_the_small_model(words):
    found = [STAND_INS.get(word, word) for word in words]
    for flag, few in FEW.items():
        if flag in found:
            found[found.index(flag) + 1] = few
    if "--length" in found:  # the stand-in reads 128 tokens
        at = found.index("--length") + 1
        found[at] = str(min(128, int(found[at])))
    if found[0] in ("surgery", "report"):
        found += ["--seeds", "1"] if "--seeds" not in found else []
    if "--model" not in found and found[0] not in ("generate", "evaluate"):
        found += ["--model", "tiny"]
    if "--n-docs" not in found and found[0] != "generate":
        found += ["--n-docs", "6"]
    return found


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """What the pages take a reader to have: notes, and a file of own documents."""
    texts = [text[:4000] for text in documents("stdlib") if len(text) > 1500][:400]
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f"notes/{number}.txt").write_text(text)
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words, capsys):
    """Run a command; what it printed."""
    assert main(words) == 0, (words, capsys.readouterr().err[-600:])
    return capsys.readouterr().out


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES if list(commands(p))])
def test_commands_run_as_printed(page, readers_folder, capsys):
    known = set()
    if page.name != "probe.md":  # the page that a reader comes from
        probe = ["probe", "--model", "tiny", "--n-docs", "6", "--length", "64"]
        assert main([*probe, "--out", "gains.safetensors"]) == 0
        known.add("gains.safetensors")
    for words in commands(page):
        if page.name == "index.md" and words[0] == "report":
            continue  # the same command as in analyse.md
        small = on_the_small_model(words)
        if "--out" in small:
            out = small[small.index("--out") + 1]
            if out in known:  # two ways to the same file: the second is another reader's
                small[small.index("--out") + 1] = f"again-{out}"
            known.add(out)
        run(small, capsys)


def test_next_lines_lead_from_the_probe_to_generated_text(readers_folder, capsys):
    """From one command to the next, with nothing but what was printed."""
    words = ["probe", "--model", "tiny", "--text", "notes", "--n-docs", "5", "--length", "40"]
    seen = []
    while words:
        seen.append(words[0])
        if words[0] in ("surgery", "slim"):
            assert words[words.index("--text") + 1] == "notes"
            assert words[words.index("--length") + 1] == "40"
            words += ["--seeds", "1"] if words[0] == "surgery" else ["--judge", "4"]
        printed = run(words, capsys).splitlines()
        following = [line for line in printed if line.startswith("next: gainlens ")]
        words = shlex.split(following[0])[2:] if following else None
    assert seen == ["probe", "map", "surgery", "slim", "generate"]


def test_the_next_line_of_a_healed_model(readers_folder, capsys):
    words = ["train", "--model", "tiny", "--n-docs", "6", "--length", "40", "--steps", "1"]
    words += ["--monitor", "2", "--judge", "3", "--seed", "2", "--fraction", "0.25"]
    words += ["--text", "notes"]
    line = next(x for x in run(words, capsys).splitlines() if x.startswith("next:"))
    words = shlex.split(line)[2:]
    assert words[words.index("--judge") + 1] == "3" and words[words.index("--seed") + 1] == "2"
    assert "--fraction" not in words
    assert "next: gainlens generate slim" in run(words, capsys)
