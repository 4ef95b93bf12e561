"""Pages are filled from recorded runs and the code's tables, and public names are documented."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/docs"))

import fill
from parts import api, docstrings, healing, markdown, support, worth_ledger

import gainlens as gl

pytestmark = pytest.mark.one_env


def test_pages_and_pictures_are_up_to_date():
    assert fill.stale() == []


def test_a_stale_table_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    text = fill.filled("<!-- claims -->\n<!-- /claims -->\n")
    page.write_text(text.replace("**fails**", "**holds**", 1))
    monkeypatch.setattr(fill, "pages", lambda: [page])
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    assert [line for line in fill.stale() if "README.md is stale" in line]


def test_public_names_are_documented():
    assert docstrings.faults() == []


def test_faults_of_a_docstring_are_found():
    def undocumented(tokens, length): ...

    def silent(length: int) -> None:
        """Check ``length``."""
        raise ValueError(length)

    def partly(tokens, length):
        """Read ``tokens``."""

    def unshaped(tokens: "torch.Tensor"):
        """Read ``tokens``."""

    silent.__annotations__ = {"length": "int"}
    assert docstrings.faults_of(undocumented, "f") == ["f: no docstring"]
    assert docstrings.faults_of(silent, "f") == ["f: raises, and says nothing of it"]
    assert docstrings.faults_of(partly, "f") == ["f: says nothing of length"]
    assert "unknown shape" in docstrings.faults_of(unshaped, "f")[0]


def test_an_override_may_leave_its_parameters_to_the_base_class():
    class Base:
        def edit(self, tensors: "dict[str, torch.Tensor]", depth: int):
            """Change ``tensors`` down to ``depth``."""

    class Kind(Base):
        def edit(self, tensors: "dict[str, torch.Tensor]", depth: int):
            """Change nothing."""

    Base.__module__ = Kind.__module__ = "gainlens.made_up"
    above = docstrings.overridden(Kind, "edit")
    assert docstrings.faults_of(Kind.edit, "f", "", above) == []
    assert docstrings.faults_of(Kind.edit, "f") == ["f: says nothing of tensors, depth"]


def test_every_public_name_is_on_one_api_page():
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs/api").glob("*.md")))
    for name in gl.__all__:
        assert text.count(f"{{ #gainlens.{name} }}") == 1, name
    down = [f"{room}.{n}" for room, names in gl._ONE_LEVEL_DOWN.items() for n in names]
    listed = [name for entries in api.names_by_page().values() for name, _ in entries]
    assert sorted(listed) == sorted([*gl.__all__, *down])


def test_a_missing_record_says_how_to_make_it(monkeypatch, tmp_path):
    from parts import claims, from_scratch, ledgers, slim, worth

    for module in (claims, healing, ledgers, slim, worth):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for name in ("RUN", "COST"):
        monkeypatch.setattr(from_scratch, name, tmp_path / "none.json")
    for make in (claims.claims, claims.cuts, claims.surgery, claims.similarity,
                 claims.findings, claims.sharing_cost,
                 claims.planted, ledgers.kernels, ledgers.engines, slim.page, healing.page,
                 from_scratch.page, ledgers.cost, worth.worth):  # fmt: skip
        assert "Not recorded yet" in make()


def test_records_of_the_map_before_and_after_the_profile(monkeypatch):
    """Keys of the present are taken from a map that is made here."""
    from parts import claims

    gains = np.random.default_rng(0).lognormal(0, 0.5, (5, 1, 12))
    cmap = gl.coordinate_map(gains, frequency=10.0 ** -np.arange(12), n_permutations=9)
    mapped, summary = cmap.to_json(), cmap.summary()
    line = claims._agreement(mapped)
    assert f"{summary['residual_correlation']:.3f}" in line
    assert f"{summary['null_cosine_frequency']:.3f}" in line
    old = {"cosine": 0.9, "null_cosine_band": 0.8}
    assert "0.800" in claims._agreement({"summary": old})

    row = {"score": "qk", "stage": "rotated", "unit": "pair", "answer": cmap.answer, **summary}
    cost = {"scope": "universal", "order": "random", "fraction": 0.5, "score": "random",
            "rise": 1.5, "interval": [1.0, 2.0]}  # fmt: skip
    measured = {"rows": [cost], "n_documents": 2, "n_tokens": 512}
    facts = {"map": {**mapped, "sharing_cost": measured}, "similarity": [row]}
    monkeypatch.setattr(claims, "recorded", lambda path: facts)
    head, _, values = claims.similarity().splitlines()[:3]
    cells = dict(zip(head.split("|"), values.split("|"), strict=True))
    assert cells[" beyond frequency "].strip() == f"{summary['residual_correlation']:.3f}"
    assert cells[" frequency null "].strip() == f"{summary['null_cosine_frequency']:.3f}"
    assert "| universal, random (control) | random | 50% | +1.500 |" in claims.sharing_cost()

    before = {"sharing": "random model", "cut": 0.5, "score": "random", "rise": 1.5,
              "interval": [1.0, 2.0]}  # fmt: skip
    facts["map"] = {"price": {**measured, "rows": [before]}}
    assert "| universal, random (control) | random | 50% | +1.500 |" in claims.sharing_cost()


def test_numbers_read_as_numbers():
    made = [markdown.number(v) for v in (None, True, 12345, 0.5, 12345.6, 1e-7, [0.1, 0.2])]
    assert made == ["–", "yes", "12,345", "0.5", "12,346", "1.0e-07", "0.1 to 0.2"]


def test_engines_of_the_support_table():
    """Put down by hand."""
    every = {"gainlens", "transformers", "vllm", "llama.cpp"}
    for name in ("Llama", "Mistral", "Qwen2"):
        assert set(support.engines_of(f"{name}ForCausalLM")) >= every
    for name in ("Qwen3", "Gemma3", "GPTNeoX"):
        assert set(support.engines_of(f"{name}ForCausalLM")) & every == {"gainlens"}
    assert set(support.engines_of("GPT2LMHeadModel")) & every == {"gainlens"}
    assert support.engines_of("NoSuchForCausalLM") == ()


def test_navigation_has_every_page_once():
    class Loader(yaml.SafeLoader):
        """mkdocs' own tags mean nothing here."""

    Loader.add_multi_constructor("", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def leaves(entry):
        if isinstance(entry, str):
            yield entry
        for inner in entry if isinstance(entry, list) else ():
            yield from leaves(inner)
        for inner in entry.values() if isinstance(entry, dict) else ():
            yield from leaves(inner)

    assert sorted(leaves(nav)) == sorted(
        p.relative_to(ROOT / "docs").as_posix() for p in fill.written()
    )


def test_a_row_of_the_worth_ledger_has_the_verdict_of_its_own_precision():
    def judged(rise, status):
        verdict = {"estimate": rise, "status": status, "interval": [rise - 0.01, rise + 0.01]}
        return {"256": {"verdict": verdict}}

    def timed(checkpoint, cache, speed):
        cell = {"engine": "gainlens", "context": 8000, "batch": 8, "tokens_per_second": speed}
        return {**cell, "checkpoint": checkpoint, "cache": cache, "ratio": speed / 10}

    losses = {
        "intact": {"bf16": judged(0.004, "holds")},
        "thin": {"f32": judged(0.3, "fails"), "bf16": judged(0.015, "holds")},
    }
    rows = [timed("intact", "f32", 8.0), timed("intact", "bf16", 10.0)]
    rows += [timed("thin", "f32", 9.0), timed("thin", "bf16", 13.0)]
    found = {"losses": {"rows": losses}, "speed": {"rows": rows}}
    assert worth_ledger.worst(found, "intact", "f32")["status"] == "is the baseline"
    assert worth_ledger.worst(found, "intact", "bf16")["estimate"] == 0.004
    assert worth_ledger.worst(found, "thin", "f16")["estimate"] == 0.3
    said = worth_ledger.answer(found)
    assert "holds at 0.02 nats is thin in bf16 in gainlens: × 1.30" in said
    assert "at +0.015 nats on its worst text" in said
