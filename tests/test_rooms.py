"""The order of the rooms is a contract in ``pyproject.toml`` (``make lint``); this is the rest."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import gainlens

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.one_env


def packages():
    yield gainlens
    for found in pkgutil.walk_packages(gainlens.__path__, "gainlens."):
        if found.ispkg:
            yield importlib.import_module(found.name)


@pytest.mark.parametrize("package", list(packages()), ids=lambda p: p.__name__)
def test_no_module_hides_behind_a_name_of_its_package(package):
    for found in pkgutil.iter_modules(package.__path__):
        if found.name == "__main__":
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        assert getattr(package, found.name) is module
        assert isinstance(getattr(package, found.name), ModuleType)


def test_no_file_is_over_400_lines():
    long = {
        str(path.relative_to(ROOT)): n
        for path in (ROOT / "gainlens").rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


def test_the_rooms_of_the_guide_are_those_of_the_contract():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for folder in sorted((ROOT / "gainlens").iterdir()):
        if (folder / "__init__.py").exists() and folder.name != "files":  # below all rooms
            assert f'"{folder.name}"' in contract
            assert f"`gainlens/{folder.name}`" in guide


def test_kernels_import_nothing_from_gainlens():
    """Scripts beside the package are outside what the contract sees."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "gainlens" for n in names), path
