"""The examples in docstrings are run, in the order of the names that a notebook has.

Each example starts with a small model, its text, gains, a mask, a plan, a cut and a curve under the
names that the documentation uses. Output is compared where an example states it.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import warnings

import gainlens_kernels
import numpy as np
import pytest
import torch

import gainlens as gl

pytest.importorskip("triton", reason="modules of the GPU kernels are imported for their examples")

pytestmark = pytest.mark.one_env

NOT_RUN = {
    "gainlens.analysis.task_running.score_tasks": "1,024 tokens; the small model reads 128",
}
"""Examples that need more than the small model, and why."""


class Stated(doctest.OutputChecker):
    """Compare only where the example states what comes out."""

    def check_output(self, want, got, flags):
        return want == "" or super().check_output(want, got, flags)


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for package in (gl, gainlens_kernels):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__") or found.name.split(".")[-1].startswith("_"):
                continue
            module = importlib.import_module(found.name)
            for test in finder.find(module, found.name, globs={}):
                if test.examples:
                    yield test


FOUND = {test.name: test for test in examples()}


@pytest.fixture(scope="module")
def names(tiny, tiny_calibration, tiny_validation, tiny_gains):
    """What a notebook has after the first cells."""
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    curve = gl.surgery(tiny, tiny_validation, tiny_gains, (0.25, 0.5), seeds=(0,), progress=False)
    return {
        "gl": gl, "np": np, "torch": torch, "model": tiny, "tokens": tiny_calibration,
        "calibration": tiny_calibration, "validation": tiny_validation, "gains": tiny_gains,
        "mask": mask, "plan": gl.SlicePlan.from_mask(mask), "curve": curve,
        "cmap": gl.coordinate_map(tiny_gains, n_permutations=99),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(FOUND) - set(NOT_RUN)))
def test_example(name, names, tmp_path, monkeypatch):
    test = FOUND[name]
    monkeypatch.chdir(tmp_path)
    names["mask"].save("cut.safetensors")
    own = dict(vars(importlib.import_module(module_of(name))))
    test.globs = {**own, **names}
    if name.startswith("gainlens.training"):  # changes the model, which other tests share
        test.globs["model"] = gl.load_model("tiny")
    report = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short texts: what they say is tested elsewhere
        runner = doctest.DocTestRunner(Stated(), optionflags=doctest.NORMALIZE_WHITESPACE)
        result = runner.run(test, out=report.append, clear_globs=False)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


def module_of(name):
    while True:
        name = name.rpartition(".")[0]
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return name


def test_what_is_not_run_is_there_and_has_a_reason():
    assert set(NOT_RUN) <= set(FOUND)
    assert all(len(why.split()) > 4 for why in NOT_RUN.values())


@pytest.mark.parametrize("name", gl.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>>" in (inspect.getdoc(getattr(gl, name)) or "")
