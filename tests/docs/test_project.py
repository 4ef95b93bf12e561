"""One place for each fact: the version, the owner of a recorded result, the make targets."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import gainlens

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.one_env


def test_the_version_is_in_one_place():
    """The build reads it from the package; nothing else states it."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in pyproject["project"]
    version = pyproject["tool"]["scikit-build"]["metadata"]["version"]
    text = (ROOT / version["input"]).read_text(encoding="utf-8")
    found = re.findall(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found == [gainlens.__version__]
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("\n", 1)[1]


def test_every_result_is_named_as_the_command_that_writes_it():
    """``docs/results/NAME.json`` is of ``benchmarks/NAME.py``, or of ``gainlens report``."""
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} | {"report"}
    for path in sorted((ROOT / "docs/results").iterdir()):
        owners = [c for c in commands if path.stem == c or path.stem.startswith(f"{c}_")]
        assert owners, f"docs/results/{path.name} is of no command"


def test_default_places_of_results_are_in_the_folder_of_results():
    """Every path of a record in a benchmark is one that is there, under the name that it has."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "kernels/bench").glob("*.py")]
    named = {
        name
        for path in scripts
        for name in re.findall(r"docs/results/([\w.-]+\.json)", path.read_text(encoding="utf-8"))
    }
    there = {path.name for path in (ROOT / "docs/results").iterdir()}
    assert named >= {"probe.json", "engines.json", "coordinate_map_scale.json"}
    unrecorded = {"kernels_cuda.json", "budgets.json"}
    assert named - there <= unrecorded, "not recorded"


def prose(text: str) -> str:
    """What a person reads aloud: no code, no tables, no comments, no pictures, no addresses."""
    for gone in (r"```.*?```", r"<!--.*?-->", r"^\|.*?$", r"!\[.*?\]\(.*?\)"):
        text = re.sub(gone, "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text, flags=re.DOTALL)


def test_the_readme_is_read_aloud_in_two_minutes():
    words = prose((ROOT / "README.md").read_text(encoding="utf-8")).split()
    assert 200 < len(words) <= 330, "some 150 words a minute"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("ledger_*.md")), ids=lambda p: p.stem)
def test_a_ledger_opens_with_words_and_says_which_way_is_better(path):
    _, _, text = path.read_text(encoding="utf-8").partition("\n")
    opening = re.split(r"^(?:## |<!-- |\|)", text, flags=re.MULTILINE)[0]
    assert len(re.findall(r"[.:](?:\s|$)", prose(opening))) >= 3, "three sentences before figures"
    assert re.search(r"\b(better|faster|lower|below)\b", prose(text), re.IGNORECASE)


def test_every_make_target_is_defined_once_and_explained():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = Counter(re.findall(r"^([a-z][a-z-]*):(?!=)", text, re.MULTILINE))
    assert targets["help"] == targets["test-fast"] == 1
    assert [name for name, times in targets.items() if times > 1] == []
    explained = set(re.findall(r"^([a-z][a-z-]*):(?!=).*  ## \S", text, re.MULTILINE))
    assert set(targets) - explained == set()
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert set(phony[1].replace("\\\n", " ").split()) == set(targets)


def test_paths_that_the_makefile_names_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"\b((?:benchmarks|tools|tests|kernels|constraints)/[\w./-]+)", text)
    assert len(found) > 20
    for path in found:
        assert (ROOT / path).exists(), path
