"""Every code block of the README, CONTRIBUTING and the site runs.

The blocks of a page are run one after the other, as in a notebook, on the small model. A comment
before a block says otherwise: ``<!-- not run: why -->`` (compiled only) or
``<!-- raises: NameOfError -->`` (wrong code that must be refused).
"""

from __future__ import annotations

import builtins
import re
import shlex
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import gainlens as gl
from gainlens.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/docs"))

import fill

PAGES = fill.pages()
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>not run|raises): (?P<said>[^\n]*?) -->\n)?```(?P<kind>[^\n]*)\n"
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
KINDS = {"python", "sh", "text"}
DOCUMENTS, LENGTH = 4, 64


def blocks(page, kind):
    return [m for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["kind"] == kind]


def having(kind):
    return [pytest.param(p, id=p.name) for p in PAGES if blocks(p, kind)]


@pytest.mark.one_env
def test_every_block_is_of_a_kind_that_is_checked():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        kinds = [m["kind"] for m in BLOCK.finditer(text)]
        assert set(kinds) <= KINDS, page
        assert len(kinds) == len(re.findall(r"^```\w", text, re.MULTILINE)), page
        prose = BLOCK.sub("", text)
        assert not re.search(r"\n\n    (?!options)[^-*:\d ]", prose), f"{page}: indented block"


@pytest.fixture(scope="module")
def tiny_loader():
    """The small model in the place of any named one; fresh each time, since a page may train it."""
    load = gl.load_model
    return lambda name, kind=None, **_: load("tiny")


@pytest.fixture
def _figures():
    """What a page draws is closed after it."""
    yield
    plt.close("all")


@pytest.mark.usefixtures("_figures")
@pytest.mark.parametrize("page", having("python"))
def test_python_blocks_run(page, tiny_loader, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gl, "load_model", tiny_loader)
    tokens = gl.load_tokens

    def few(source, model, **asked):
        asked["n_docs"] = min(DOCUMENTS, asked.get("n_docs", DOCUMENTS))
        asked["length"] = min(LENGTH, asked.get("length", LENGTH))
        return tokens(source, model, **asked)

    monkeypatch.setattr(gl, "load_tokens", few)
    names = {}
    for block in blocks(page, "python"):
        line = page.read_text(encoding="utf-8")[: block.start("code")].count("\n")
        code = compile("\n" * line + block["code"], str(page), "exec")
        if block["marker"] == "not run":
            continue
        if block["marker"] == "raises":
            with pytest.raises(
                getattr(gl, block["said"], None) or getattr(builtins, block["said"])
            ):
                exec(code, names)
        else:
            exec(code, names)


@pytest.mark.one_env
@pytest.mark.parametrize("page", having("sh"))
def test_shell_blocks_are_commands_that_exist(page):
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in blocks(page, "sh"):
        if block["marker"] == "not run":
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]  # settings of the environment
            if not words:
                continue
            if words[:2] == ["accelerate", "launch"]:
                words = words[words.index("-m") + 1 :]  # what it launches
            match words:
                case ["gainlens", *arguments]:
                    build_parser().parse_args(arguments)
                case ["make", *targets]:
                    for target in targets:
                        if "=" in target:
                            assert f"{target.split('=')[0]} ?=" in make, line
                        else:
                            assert re.search(rf"^{re.escape(target)}:", make, re.MULTILINE), line
                case ["python", "-m", "pytest", *rest]:
                    for path in [word for word in rest if word.startswith("tests")]:
                        assert (ROOT / path).exists(), line
                case ["pip", "install", *wanted]:
                    if "--index-url" in wanted:  # where PyTorch has its builds for a CPU
                        at = wanted.index("--index-url")
                        assert wanted[at + 1] == "https://download.pytorch.org/whl/cpu", line
                        del wanted[at : at + 2]
                    for word in wanted:
                        extra = re.fullmatch(r"\.\[(\w+)\]", word)
                        known = rf"^{extra[1]} = \[" if extra else re.escape(word)
                        there = re.search(known, pyproject + make, re.MULTILINE)
                        assert word in (".", "--no-deps") or there, line
                case ["vllm", "serve", *_]:
                    assert (ROOT / "plugins/vllm/pyproject.toml").is_file(), line
                case ["python", script, *_]:
                    assert (ROOT / script).is_file(), line
                case _:
                    raise AssertionError(f"{page.name}: {line!r} is checked by no rule")
