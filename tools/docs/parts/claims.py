"""What the recorded runs say about the claims: for the README and the page of claims."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, interval, listed, not_yet, number, provenance, recorded, table

REPORT = "report_smollm2.json"
LEARNED = {
    "sotu": "speeches",
    "stdlib": "code",
    "headers": "C++ headers",
    "readmes": "packages' descriptions",
    "recall": "stretches of them said again",
}
"""Training texts in words."""


def claims() -> str:
    """The claims of a recorded report."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the claims", "make report")
    tokens, plan, machine = facts["tokens"], facts["plan"], facts["machine"]
    rows = [
        (c["quote"], f"**{c['status']}**", c["number"], c["control"],
         c["where"] or f"the calibration text: {documents(plan)}")
        for c in facts["claims"]
    ]  # fmt: skip
    return (
        table(["claim", "on SmolLM2-135M", "number", "control", "measured on"], rows)
        + f"\n\n{documents(plan)} chose the cuts ({tokens['calibration']} tokens in all); as many "
        "others judged them. Of several texts the worst decides. No claim is to be quoted beyond "
        f"the texts and the context beside it. {machine['processor']}, {machine['cores']} cores, "
        f"{facts['seconds']:.0f} s, torch {facts['versions']['torch']}."
    )


def documents(plan: dict[str, Any]) -> str:
    """The documents of a report's sweep, in words."""
    return (
        f"{plan['n_docs']} documents of {plan['text'].replace(',', ', ')} × {plan['length']} tokens"
    )


def position() -> str:
    """Rise of the loss by position, on every text of the recorded report."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the rise by position", "make report")
    rows = [
        (name, row["cut"], f"{row['first']:,}–{row['last']:,}", f"{row['rise']:+.3f}",
         interval(row["interval"]), str(row["n_documents"]))
        for name, rise in facts["reach"]["by_position"].items()
        for row in rise["rows"]
    ]  # fmt: skip
    head = ["text", "half cut, by", "positions", "rise (nats)", "95% interval", "documents"]
    return table(head, rows) + "\n\n" + provenance(facts, f"docs/results/{REPORT}")


def across() -> str:
    """The best cut chosen on one text, judged on another."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the cuts across texts", "make report")
    found = facts["reach"]["across_texts"]
    judged = list(dict.fromkeys(row["judged_on"] for row in found))
    at = {(row["chosen_on"], row["judged_on"]): row for row in found}
    rows = [
        (one, *(f"{at[one, other]['rise']:+.3f} ({interval(at[one, other]['interval'])})"
                for other in judged))
        for one in dict.fromkeys(row["chosen_on"] for row in found)
    ]  # fmt: skip
    return (
        table(["chosen and fitted on", *(f"judged on {name}" for name in judged)], rows)
        + f"\n\nRise of the loss in nats per token with half of the pairs of each layer cut and "
        f"refitted, on {found[0]['n_documents']} documents of {facts['plan']['length']} tokens "
        "each, with 95% intervals."
    )


def tasks() -> str:
    """Scores of the intact and the cut model on tasks."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the tasks", "make report")
    found = facts["reach"]["tasks"]
    rows, nothing = [], []
    for row in found["rows"]:
        if not row["shows"]:
            if row["label"] == "intact":
                nothing.append(row["task"])
            continue
        change = "" if row["label"] == "intact" else f"{row['difference']:+.3f}"
        bounds = "" if row["label"] == "intact" else interval(row["interval"])
        rows.append(
            (row["task"], row["label"], f"{row['exact_match']:.0%}", f"{row['choice']:.0%}",
             change, bounds)
        )  # fmt: skip
    head = ["task", "model", "exact", "right one chosen", "log-probability (nats)", "95% interval"]
    plan = facts["plan"]
    silent = (
        f" At chance when intact, so they show nothing: {', '.join(nothing)}." if nothing else ""
    )
    groups = "; ".join(
        f"{row['group']} {row['difference']:+.3f} ({interval(row['interval'])})"
        for row in found["groups"]
        if row["label"] != "intact"
    )
    return (
        table(head, rows)
        + f"\n\nBy kind of knowledge, nats per answer token: {groups}."
        + f"\n\n{plan['task_prompts']} prompts of {plan['task_length']:,} tokens per task.{silent} "
        + provenance(facts, f"docs/results/{REPORT}")
    )


def findings() -> str:
    """What the recorded runs say in four rows: for the README."""
    report = recorded(RESULTS / REPORT)
    healed = recorded(RESULTS / "healing_layer-50.json")
    speed = recorded(RESULTS / "slim_ledger.json")
    if report is None or healed is None or speed is None:
        return not_yet("the findings", "make report bench-heal acceptance")
    mapped, margin = report["map"], healed["verdict"]["margin"]
    ratios = [row["decode_ratio"] for row in speed["contexts"]]
    contexts = [row["context"] for row in speed["contexts"]]
    return table(
        ["question", "answer on SmolLM2-135M", "number", "measured on"],
        [
            _untrained(report, margin),
            _if_trained(healed),
            (
                "Do all layers use the same dimensions?",
                f"**{mapped['answer']}**",
                _agreement(mapped),
                documents(report["plan"]),
            ),
            (
                "Is a model with half of the key dimensions twice as fast?",
                f"**{'yes' if max(ratios) >= 2 else 'no'}**",
                f"decoding × {min(ratios):.2f} to × {max(ratios):.2f}; at most "
                f"× {speed['twice_as_fast']['limit']:.2f} at any context",
                f"contexts of {min(contexts):,} to {max(contexts):,} tokens, 2 CPU cores",
            ),
        ],
    )


def _slot_runs(scope: str) -> list[dict[str, Any]]:
    """Those of ``benchmarks/slots.py`` that halve the keys, learned from most texts first."""
    names = (f"{scope}-50{learned}" for learned in ("-wide", "-recall", ""))
    found = [recorded(RESULTS / f"slots_{name}.json") for name in names]
    return [run for run in found if run is not None]


def _untrained(report: dict[str, Any], margin: float) -> tuple[str, ...]:
    """The refitted cut per layer on its worst text; the report's own where no other is recorded."""
    question, best = "Can half of the key dimensions go without training?", report["best_cut"]
    control = f"{best['control']} on {documents(report['plan'])}"
    how = "with a least-squares refit"
    runs = _slot_runs("layer")
    if not runs:
        verdict, where, far = best["verdict"], best["where"], ""
    else:
        run = runs[0]
        verdicts = run["untrained"]["verdicts"]
        verdict = max(verdicts.values(), key=lambda v: v["estimate"])
        rows = [r for f in run["untrained"]["by_position"].values() for r in f["rows"]]
        far = f", up to {max(r['rise'] for r in rows):+.3f} far into a text"
        how += ", on the worst text"
        where = f"{', '.join(verdicts)}: 256 tokens, and by position to 2,048"
    return (
        question,
        f"a rise below {margin:g} nats {_bold(verdict['status'])} {how}",
        f"loss {verdict['estimate']:+.3f} nats ({interval(verdict['interval'])}){far}; {control}",
        where,
    )


def _if_trained(speeches: dict[str, Any]) -> tuple[str, ...]:
    """The healed cut per layer on its worst text; speeches alone where it is not recorded."""
    verdict, text = speeches["verdict"], speeches["text"]
    alone = (
        f"{verdict['estimate']:+.3f} nats ({interval(verdict['interval'])}) on "
        f"{text['validation_documents']} speeches"
    )
    runs = _slot_runs("layer") + _slot_runs("universal")
    judged = [run for run in runs if run["healed"] is not None]
    question = "Can they go if the rest is trained?"
    if not judged:
        status = f"a rise below {verdict['margin']:g} nats **{verdict['status']}**"
        return question, status, f"loss {alone}", f"{text['length']} tokens"

    best = judged[0]["healed"]
    verdict = max(best["verdicts"].values(), key=lambda v: v["estimate"])
    far = max(r["rise"] for f in best["by_position"].values() for r in f["rows"])
    learned = [LEARNED.get(name, name) for name in judged[0]["text"]["training"]["texts"]]
    return (
        question,
        f"a rise below {verdict['margin']:g} nats **{verdict['status']}** on the worst text",
        f"loss {verdict['estimate']:+.3f} nats ({interval(verdict['interval'])}), up to {far:+.3f} "
        f"far into a text, after {best['facts']['tokens']:,} tokens of training on "
        f"{listed(learned)}; trained and judged on speeches alone {alone}",
        f"{', '.join(best['verdicts'])}: 256 tokens, and by position to 2,048",
    )


def _agreement(mapped: dict[str, Any]) -> str:
    """The number behind the map's answer, by what the record holds."""
    s = mapped["summary"]
    cosine = f"cosine {s['cosine']:.3f} between layers"
    if "residual_correlation" not in s:  # a record of before the profile was subtracted
        return f"{cosine}; the rotary frequencies alone give {s['null_cosine_band']:.3f}"
    return (
        f"correlation beyond rotary frequency {s['residual_correlation']:.3f} "
        f"({interval(mapped['effect']['interval'])}); {cosine}, of which the rotary frequencies "
        f"alone give {s['null_cosine_frequency']:.3f}"
    )


def _bold(status: str) -> str:
    return f"is **{status}**" if status == "undecided" else f"**{status}**"


def cuts() -> str:
    """Rise of the loss by method and share cut, without training."""
    facts = recorded(RESULTS / "surgery_smollm2.json")
    if facts is None:
        return not_yet("the cuts", "python benchmarks/surgery.py")
    rows = [
        (
            f"{p['fraction']:.0%}",
            p["label"].rsplit(",", 1)[0],
            f"{p['delta']:+.3f}",
            interval(p["interval"]),
        )
        for p in facts["points"]
    ]
    text = facts["text"]
    return (
        table(["cut", "how", "rise of the loss (nats)", "95% interval"], rows)
        + f"\n\nJudged on {text['validation_documents']} speeches of {text['length']} tokens; "
        f"nothing was measured beyond position {text['length']}. {text['score_documents']} "
        f"calibration speeches ranked the pairs, {text['refit_documents']} fitted the refit. The "
        f"loss of the intact model is {facts['intact_loss']:.3f} nats."
    )


def surgery() -> str:
    """Every point of the recorded report."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the surgery", "make report")
    rows = []
    for row in facts["surgery"]:
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        rows.append(
            (
                row["label"] or row["order"] + seed,
                f"{row['fraction']:.0%}",
                f"{row['loss']:.3f}",
                f"{row['delta']:+.3f}",
                interval(row["interval"]),
            )
        )
    head = ["order", "cut", "loss (nats)", "rise of the loss (nats)", "95% interval"]
    plan = facts["plan"]
    return (
        table(head, rows)
        + f"\n\nJudged on {documents(plan)}. "
        + provenance(facts, f"docs/results/{REPORT}")
    )


def similarity() -> str:
    """The cosine beside its CV, its nulls and its centred value, for every gain."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the map", "make report")
    found = facts["similarity"]
    beyond = any("residual_correlation" in row for row in found)
    second = "null_cosine_frequency" if beyond else "null_cosine_band"
    rows = [
        (
            row["score"],
            row["stage"],
            row["unit"],
            f"{row['cosine']:.3f}",
            f"{row['null_cosine']:.3f}",
            f"{row[second]:.3f}" if second in row else "–",
            f"{row['cv']:.2f}",
            f"{row['centred_cosine']:.3f}",
            *([f"{row['residual_correlation']:.3f}"] if beyond else []),
            row["answer"],
        )
        for row in found
    ]
    name = "frequency null" if beyond else "band null"
    head = ["gain", "stage", "unit", "cosine", "null", name, "CV", "centred"]
    head += ["beyond frequency", "answer"] if beyond else ["answer"]
    note = (
        "*Beyond frequency* is the mean correlation of residuals, which decides the answer. "
        if beyond
        else "This record has an earlier null in the place of the frequency null: the *band null* "
        "shuffles only units of similar rotary frequency. "
    )
    return table(head, rows) + f"\n\n{note}" + provenance(facts, f"docs/results/{REPORT}")


def sharing_cost() -> str:
    """What one set for all heads costs beside a set per layer and per head."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the sharing cost", "make report")
    found = facts["map"].get("sharing_cost") or facts["map"].get("price")  # its earlier name
    if not found:
        return not_yet("the sharing cost", "make report")
    rows = [
        (_scope(r), str(r["score"]), f"{r['fraction' if 'fraction' in r else 'cut']:.0%}",
         f"{r['rise']:+.3f}", interval(r["interval"]))
        for r in found["rows"]
    ]  # fmt: skip
    return (
        table(["scope", "ranked by", "cut", "rise of the loss (nats)", "95% interval"], rows)
        + f"\n\nMeasured on {found['n_documents']} documents of "
        f"{found['n_tokens'] // found['n_documents']} tokens."
    )


def price() -> str:
    """What one set costs zeroed, refitted and with slots; healed where it is recorded."""
    facts = recorded(RESULTS / REPORT)
    found = None if facts is None else facts["reach"].get("price")
    if not found:
        return not_yet("the price of one coordinate system", "make report")
    at = {(r["scope"], r["kind"]): r for r in found["rows"]}
    kinds = list(dict.fromkeys(r["kind"] for r in found["rows"]))
    rows = []
    for scope, shared_by in SHARED_BY.items():
        cells = []
        for kind in kinds:
            row = at.get((scope, kind))
            cells.append(
                "–" if row is None else f"{row['rise']:+.3f} [{interval(row['interval'])}]"
            )
        runs = _slot_runs(scope)
        if not runs or runs[0]["healed"] is None:
            cells.append("–")
        else:
            rises = [v["estimate"] for v in runs[0]["healed"]["verdicts"].values()]
            cells.append(f"{min(rises):+.3f} to {max(rises):+.3f}")
        rows.append((shared_by, *cells))
    n, plan = found["n_documents"], facts["plan"]
    return (
        table(["shared by", *kinds, "healed"], rows)
        + f"\n\n{found['fraction']:.0%} of every head is cut. The untrained columns are of the "
        f"report: {n} validation documents of {plan['text']}, {plan['length']} tokens, fitted on "
        f"{plan['n_docs']} such documents; mean rise in nats per token with 95% intervals. "
        "The healed column is of `benchmarks/slots.py` (its fit has more text): from the best "
        "to the worst text.\n\n" + provenance(facts, f"docs/results/{REPORT}")
    )


SHARED_BY = {"head": "each head", "layer": "each layer", "universal": "the whole model"}


def _scope(row: dict[str, Any]) -> str:
    """The scope of a row of the sharing cost, and whether it is the control."""
    if "scope" in row:
        control = ", random (control)" if row["order"] == "random" else ""
        return f"{row['scope']}{control}"
    # A record of before the scopes had one name each calls the set for all heads "model".
    scopes = {"model": "universal", "random model": "universal, random (control)"}
    return scopes.get(row["sharing"], row["sharing"])


def planted() -> str:
    """How often the map finds what was planted, and says no where nothing is shared."""
    facts = recorded(RESULTS / "coordinate_map_planted.json")
    if facts is None:
        return not_yet("the planted maps", "python benchmarks/coordinate_map.py --planted")
    rows = [
        (name, f"{row['not_shared_of_100']}%", f"{row['no_universal_unit_of_100']}%",
         f"{row['smallest_mean_cosine']:.3f}")
        for name, row in facts["nothing_shared"].items()
    ]  # fmt: skip
    return (
        f"Where the planted units are at least twice as large as the rest, the lowest mean F1 over "
        f"{len(facts['recovery'])} settings is {number(facts['f1_mean_worst'])} "
        f"({facts['seeds']} seeds each). Where nothing is shared, the map answers:\n\n"
        + table(["gains", "not shared", "no universal unit", "smallest mean cosine"], rows)
        + "\n\n"
        + provenance(facts, "docs/results/coordinate_map_planted.json")
    )
