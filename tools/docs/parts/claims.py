"""What recorded runs say of the claims: for the README and the claims page."""

from __future__ import annotations

from parts.markdown import RESULTS, interval, not_yet, number, provenance, recorded, table

REPORT = "report_smollm2.json"


def claims() -> str:
    """The claims of a recorded report."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the claims", "make report")
    tokens, plan, machine = facts["tokens"], facts["plan"], facts["machine"]
    rows = [(c["quote"], f"**{c['status']}**", c["number"], c["control"]) for c in facts["claims"]]
    return (
        table(["claim", "says SmolLM2-135M", "number", "control"], rows)
        + f"\n\n{plan['n_docs']} speeches of {plan['length']} tokens chose the cut "
        f"({tokens['calibration']} tokens), {plan['n_docs']} others judged it; "
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{facts['seconds']:.0f} s, torch {facts['versions']['torch']}."
    )


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
        + f"\n\n{text['score_documents']} calibration speeches ranked the pairs and "
        f"{text['refit_documents']} served the refit; {text['validation_documents']} other "
        f"speeches of {text['length']} tokens judged. Intact loss {facts['intact_loss']:.3f} nats."
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
    head = ["order", "cut", "loss (nats)", "rise (nats)", "95% interval"]
    return table(head, rows) + "\n\n" + provenance(facts, f"docs/results/{REPORT}")


def similarity() -> str:
    """The cosine beside its CV, its nulls and its centred value, for every gain."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the map", "make report")
    rows = [
        (
            row["score"],
            row["stage"],
            row["unit"],
            f"{row['cosine']:.3f}",
            f"{row['null_cosine']:.3f}",
            f"{row['null_cosine_band']:.3f}" if "null_cosine_band" in row else "–",
            f"{row['cv']:.2f}",
            f"{row['centred_cosine']:.3f}",
            row["answer"],
        )
        for row in facts["similarity"]
    ]
    head = ["gain", "stage", "unit", "cosine", "null", "band null", "CV", "centred", "answer"]
    return table(head, rows) + "\n\n" + provenance(facts, f"docs/results/{REPORT}")


def price() -> str:
    """What one shared index set costs beside a set per layer and per head."""
    facts = recorded(RESULTS / REPORT)
    if facts is None:
        return not_yet("the price of sharing", "make report")
    found = facts["map"].get("price")
    if not found:
        return not_yet("the price of sharing", "make report")
    rows = [
        (r["sharing"], str(r["score"]), f"{r['cut']:.0%}", f"{r['rise']:+.3f}",
         interval(r["interval"]))
        for r in found["rows"]
    ]  # fmt: skip
    return table(["one set per", "ranked by", "cut", "rise (nats)", "95% interval"], rows)


def planted() -> str:
    """How often the map finds what was planted, and answers no where nothing is shared."""
    facts = recorded(RESULTS / "coordinate_map_planted.json")
    if facts is None:
        return not_yet("the planted maps", "python benchmarks/coordinate_map.py --planted")
    rows = [
        (name, f"{row['not_shared_of_100']}%", f"{row['no_universal_unit_of_100']}%",
         f"{row['smallest_mean_cosine']:.3f}")
        for name, row in facts["nothing_shared"].items()
    ]  # fmt: skip
    return (
        f"Of units planted at twice the loudness of the rest and more, the smallest mean F1 over "
        f"the {len(facts['recovery'])} settings is {number(facts['f1_mean_worst'])} "
        f"({facts['seeds']} seeds each). Where nothing is shared, the answer is:\n\n"
        + table(["gains", "not shared", "no universal unit", "smallest mean cosine"], rows)
        + "\n\n"
        + provenance(facts, "docs/results/coordinate_map_planted.json")
    )
