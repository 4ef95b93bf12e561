"""The support table, from the code's own tables and the matrix of models that the tests run."""

from __future__ import annotations

import sys
from functools import cache

from parts.markdown import RESULTS, ROOT, not_yet, number, provenance, recorded, table

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/export")]

PAIRING = {"half": "half-split (i, i + d/2)", "adjacent": "adjacent (2i, 2i + 1)", "none": "–"}
WIDTH = 64
"""Of the heads of the small models that engines are asked about: one that all engines take."""


@cache
def engines_of(architecture: str) -> tuple[str, ...]:
    """Which engines take a small slim model of this family, with a plan that fits them."""
    from slim_families import CONFIGS
    from transformers import AutoModelForCausalLM

    from gainlens.export import ENGINES, EngineLimitError, SlicePlan, slim
    from gainlens.export.families import FAMILIES as SLIM

    if architecture not in SLIM:
        return ()
    config = next(
        made
        for make, _ in CONFIGS.values()
        if type(made := make()).__name__ == SLIM[architecture].config_class
    )
    if SLIM[architecture].llama:
        config.head_dim = WIDTH
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config).eval()
    thin = slim(model, SlicePlan.identity(model))
    found = []
    for name, engine in ENGINES.items():
        try:
            engine.check(thin)
        except EngineLimitError:
            continue
        found.append(name)
    return tuple(found)


def site_of(architecture: str) -> str:
    """Which hook a cut uses."""
    from families import FAMILIES as TESTED

    if architecture not in TESTED:
        return "measured when opened"
    _, _, pairing, _, fires, _ = TESTED[architecture]
    if pairing == "none":
        return "`hook_k`"
    return "`hook_rot_k`" if fires else "`hook_k`, rotated by gainlens"


def slim_of(architecture: str) -> str:
    """What thin keys save in this family, by the configurations that the tests run."""
    from slim_families import CONFIGS

    from gainlens.export.families import FAMILIES as SLIM

    if architecture not in SLIM:
        return "no"
    family = SLIM[architecture]
    made = [make() for make, _ in CONFIGS.values()]
    found = {family.saves(c) for c in made if type(c).__name__ == family.config_class}
    if len(found) > 1:
        return "weights and cache; with a norm on keys the cache alone"
    return found.pop()


def parity_of(architecture: str) -> str:
    """The largest difference from the masked original that the record holds, prompt and tokens."""
    facts = recorded(RESULTS / "slim_families.json") or {"rows": []}
    rows = [row for row in facts["rows"] if row["model"] == architecture]
    if not rows:
        return "–"
    worst = max(max(row["difference"], row["difference_generating"]) for row in rows)
    return number(worst) if worst == 0 else f"{worst:.0e}"


def parity() -> str:
    """Every configuration of the record."""
    facts = recorded(RESULTS / "slim_families.json")
    if facts is None:
        return not_yet("docs/results/slim_families.json", "python benchmarks/slim_families.py")
    rows = [
        (
            f"{row['name']} (`{row['model']}`)",
            f"{row['moved_by_the_cut']:.2g}",
            f"{row['difference']:.1e}",
            f"{row['difference_uncut']:.1e}",
            f"{row['difference_generating']:.1e}",
            "same" if row["tokens_equal"] else "differ",
            f"{1 - row['parameters'][1] / row['parameters'][0]:.1%}",
            f"{1 - row['key_bytes'][1] / row['key_bytes'][0]:.0%}",
        )
        for row in facts["rows"]
    ]
    head = [
        "configuration", "moved by the cut", "difference", "nothing cut", "generating", "tokens",
        "parameters saved", "key cache saved",
    ]  # fmt: skip
    return table(head, rows) + "\n\n" + provenance(facts, "docs/results/slim_families.json")


def support() -> str:
    """One row per family that gainlens declares."""
    from families import FAMILIES as TESTED

    from gainlens.export.families import FAMILIES as SLIM
    from gainlens.export.family import never
    from gainlens.model.families import FAMILIES

    rows = []
    for name, family in FAMILIES.items():
        slim = SLIM.get(name)
        # What the other columns say already is not said again.
        said = ("hook_rot_k never fires",)
        notes = [n for n in family.note.split("; ") if n and n not in said]
        if slim is not None and slim.llama and slim.window is not never:
            notes.append("stock engines: only with full attention")
        rows.append(
            (
                f"`{name}`",
                PAIRING[family.pairing],
                site_of(name),
                slim_of(name),
                parity_of(name),
                ", ".join(engines_of(name)) or "–",
                "yes" if name in TESTED else "no",
                "; ".join(notes) or "–",
            )
        )
    head = [
        "family", "rotary pairs", "hook of the cut", "slim saves", "slim differs by", "engines",
        "tested", "note",
    ]  # fmt: skip
    return table(head, rows)


def scores() -> str:
    """The gains that there are."""
    from gainlens.probes.scores import SCORES

    rows = [
        (f"`{s.name}`", s.formula, "yes" if s.gauge_invariant else "no (descriptive only)")
        for s in SCORES.values()
    ]
    return table(["score", "definition", "gauge-invariant (may rank a cut)"], rows)


def modes() -> str:
    """The ablation modes that there are."""
    from gainlens.ablation.modes import MODES

    rows = [(f"`{m.name}`", m.meaning, m.commutes) for m in MODES.values()]
    return table(["mode", "what replaces the cut dimensions", "commutes with the rotation"], rows)


def engines() -> str:
    """The engines that there are."""
    from gainlens.export import ENGINES

    rows = []
    for engine in ENGINES.values():
        what = (type(engine).__doc__ or "").split("\n\n")[0].replace("``", "`")
        rows.append((f"`{engine.name}`", " ".join(what.split()), ", ".join(engine.precisions)))
    return table(["engine", "what is written", "precisions"], rows)
