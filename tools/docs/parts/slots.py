"""Cuts judged by text and position: one row per recorded run of ``benchmarks/slots.py``."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, listed, not_yet, provenance, recorded, table

ORDER = (
    "layer-50",
    "layer-50-recall",
    "layer-50-wide",
    "layer-50-long",
    "universal-50-quick",
    "universal-50-recall",
    "universal-50-wide",
    "universal-50",
    "universal-50-own",
    "universal-50-short",
    "universal-50-short-frequencies",
    "universal-50-values",
    "layer-75",
    "universal-75",
)
"""Runs, in the order of their rows."""
USUAL = 2
"""Texts that a run is fitted on where its row doesn't say."""
BESIDE = {
    "own": (
        "on own text too",
        "Own text is what the intact model wrote (`benchmarks/own_text.py`).",
    ),
    "recall": (
        "on repeating text too",
        "Repeating text says stretches of its first half again (`benchmarks/recall.py`).",
    ),
}
"""Texts beside speeches and code that a run was healed on: in a row, and in a sentence."""


def page() -> str:
    """Rise of the loss on each text, the worst position, and the verdicts."""
    found = {name: recorded(RESULTS / f"slots_{name}.json") for name in ORDER}
    runs = {name: facts for name, facts in found.items() if facts is not None}
    if not runs:
        return not_yet("the cuts by text and position", "python benchmarks/slots.py")
    rows = []
    # Later runs are judged on more texts than earlier ones, and quick ones on fewer documents.
    first = max(runs.values(), key=_judged_on)
    texts = list(first["untrained"]["verdicts"])
    for facts in runs.values():
        # Several runs heal one cut: it is shown once, as judged on most documents.
        same = [other for other in runs.values() if _cut(other) == _cut(facts)]
        fullest = max(same, key=_judged_on) is facts
        for state in ("untrained", "healed"):
            if facts[state] is not None and (state == "healed" or fullest):
                rows.append((_name(facts), _how(facts, state), *_row(facts[state], texts)))
    head = ["half or more of the pairs cut, scope", "", *(f"{name}, 256 tokens" for name in texts)]
    head += ["worst positions of 2,048", "verdicts at 0.02"]
    counts = [f"{v['n_documents']} of {n}" for n, v in first["untrained"]["verdicts"].items()]
    names = dict.fromkeys(name for facts in runs.values() for name in _beside(facts))
    said = "".join(f" {BESIDE[name][1]}" for name in names)
    fitted = list(dict.fromkeys(_fitted(facts) for facts in runs.values()))
    unseen = [n for n in texts if n not in {name for some in fitted for name in some}]
    parts = [
        table(head, rows),
        f"Rise of the loss in nats per token, with 99% intervals, on up to {', '.join(counts)}; by "
        f"position on long documents of {' and '.join(first['untrained']['by_position'])}. Fitted "
        f"on {', or on '.join(map(listed, fitted))}; nothing was learned from {listed(unseen)}."
        + said,
        *(
            f"{_name(facts)} ({facts['text']['calibration']['tokens']:,} tokens) in "
            f"{facts['fit']['seconds']:.0f} s{_memory(facts)}"
            + (
                f"; healed on {facts['healed']['facts']['tokens']:,} tokens"
                if facts["healed"]
                else ""
            )
            + f". {provenance(facts, f'docs/results/slots_{name}.json')}"
            for name, facts in runs.items()
        ),
    ]
    parts[1:1] = [_reached(facts) for facts in runs.values()]
    if (recipe := recorded(RESULTS / "slots_recipe.json")) is not None:
        parts.append(
            f"`gainlens.best_cut` alone, {recipe['fit']['rounds']} rounds on "
            f"{recipe['text']['tokens']:,} tokens, while nothing else ran: {recipe['seconds']:.0f} "
            f"s. {provenance(recipe, 'docs/results/slots_recipe.json')}"
        )
    return "\n\n".join(parts)


def _reached(facts: dict[str, Any]) -> str:
    """One sentence: how far the best state of a run is from the margin."""
    state = "healed" if facts["healed"] else "untrained"
    judged = facts[state]
    rises = [v["estimate"] for v in judged["verdicts"].values()]
    margin = next(iter(judged["verdicts"].values()))["margin"]
    far = max(row["rise"] for f in judged["by_position"].values() for row in f["rows"])
    met = "below" if max(*rises, far) < margin else "not below"
    what = f"{_name(facts)}, {_how(facts, state)}"
    said = (
        f"{what}: a rise of {min(rises):+.3f} to {max(rises):+.3f} nats on 256 tokens, at most "
        f"{far:+.3f} by position up to 2,048; {met} the margin of {margin:g}."
    )
    if state == "healed":
        points = [row for row in facts["healed"]["curve"] if row.get("rise") is not None]
        course = ", ".join(f"{row['rise']:+.3f} after {row['tokens']:,}" for row in points)
        said += f" Rise on the monitored documents by training tokens: {course}."
    return said


def rivals() -> str:
    """Other untrained ways at equal key bytes, on the same text."""
    facts = recorded(RESULTS / "rivals.json")
    if facts is None:
        return not_yet("other ways to make keys smaller", "python benchmarks/rivals.py")
    texts = list(next(iter(facts["rows"].values()))["verdicts"])
    head = ["way, share of the keys cut", *(f"{name}, 256 tokens" for name in texts)]
    head += ["worst positions of 2,048", "verdicts at 0.02"]
    rows = [(name, *_row(row, texts)) for name, row in facts["rows"].items()]
    return f"{table(head, rows)}\n\n{provenance(facts, 'docs/results/rivals.json')}"


def frequencies() -> dict[str, Any]:
    """The recorded slots; empty where there are none."""
    return recorded(RESULTS / "slots_frequencies.json") or {}


def picture(figure: Any, facts: dict[str, Any]) -> None:
    """Slots over the loudness of the pairs, and which pairs go into which slot."""
    from gainlens.plots.universality import plot_slots

    axes = figure.subplots(2, 1, height_ratios=(1, 1.6))
    plot_slots(facts, facts["importance"], axes)


def budgets() -> str:
    """The same number of dimensions, shared out evenly or by predicted damage."""
    facts = recorded(RESULTS / "budgets.json")
    if facts is None:
        return not_yet("budgets", "python benchmarks/budgets.py")
    texts = list(next(iter(facts["rows"].values()))["verdicts"])
    head = ["share", *(f"{name}, 256 tokens" for name in texts), "kept by layer", "misfit held out"]
    rows = []
    for name, row in facts["rows"].items():
        few, many = min(row["kept_by_layer"]), max(row["kept_by_layer"])
        short = [
            f"{v['estimate']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]"
            for v in row["verdicts"].values()
        ]
        kept = f"{few}" if few == many else f"{few} to {many}"
        rows.append((name, *short, kept, f"{row['misfit_held_out']:.3f}"))
    calibration = facts["text"]["calibration"]
    said = (
        f"Rise of the loss in nats per token, lower is better; {facts['fraction']:.0%} of the "
        f"keys cut, untrained, fitted on {calibration['documents']} documents "
        f"({calibration['tokens']:,} tokens)."
    )
    return f"{table(head, rows)}\n\n{said} {provenance(facts, 'docs/results/budgets.json')}"


def _name(facts: dict[str, Any]) -> str:
    """What a run cuts."""
    documents, texts = facts["text"]["calibration"]["documents"], len(_fitted(facts))
    name = f"{facts['fraction']:.0%} {facts['scope']}, fitted on {documents} documents"
    if len(lengths := facts["text"]["calibration"]["lengths"]) == 1:
        name += f" of {lengths[0]:,} tokens"
    if texts > USUAL:
        name += f" of {texts} texts"
    values = facts.get("values_kept")
    return name if values is None else f"{name}, {1 - values:.0%} of the values"


def _memory(facts: dict[str, Any]) -> str:
    """What the process that fitted held at most, where it was measured."""
    peak = facts["fit"].get("peak_gb")
    return "" if peak is None else f" and at most {peak:.2f} GB of memory, the model included"


def _fitted(facts: dict[str, Any]) -> tuple[str, ...]:
    """The texts that a run chose and fitted on."""
    return tuple(facts["text"]["calibration"]["texts"])


def _cut(facts: dict[str, Any]) -> tuple[Any, ...]:
    """What tells cuts apart: scope, budget, fit and the text of the fit."""
    fit = facts["fit"]
    return facts["run"], fit["rounds"], facts["text"]["calibration"]["sha256"]


def _judged_on(facts: dict[str, Any]) -> tuple[int, int]:
    """Texts, and documents of all of them."""
    verdicts = facts["untrained"]["verdicts"].values()
    return len(verdicts), sum(verdict["n_documents"] for verdict in verdicts)


def _beside(facts: dict[str, Any]) -> list[str]:
    """What a run was healed on beside speeches and code."""
    trained = facts["text"]["training"] or {"texts": ()}
    return [name for name in BESIDE if name in trained["texts"]]


def _how(facts: dict[str, Any], state: str) -> str:
    """The state: after how many tokens, and what was special about the healing."""
    if state != "healed":
        return state
    healing = facts["healed"]["facts"]
    parts = [f"healed on {healing['tokens']:,} tokens"]
    parts += [BESIDE[name][0] for name in _beside(facts)]
    if "frequencies" in healing["settings"]["train"]:
        parts.append("frequencies trained")
    return ", ".join(parts)


def _row(judged: dict[str, Any], texts: list[str]) -> tuple[str, ...]:
    short = [
        f"{v['estimate']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]"
        if (v := judged["verdicts"].get(name))
        else "–"
        for name in texts
    ]
    rise, where, text = max(
        (row["rise"], f"{row['first']:,}–{row['last']:,}", name)
        for name, found in judged["by_position"].items()
        for row in found["rows"]
    )
    states = dict.fromkeys(v["status"] for v in judged["verdicts"].values())
    return (*short, f"{rise:+.3f} ({text}, {where})", ", ".join(states))
