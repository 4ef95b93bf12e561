"""What half of the keys cost behind a norm: the record of ``benchmarks/behind_norm.py``."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, interval, not_yet, provenance, recorded, table

FILE = "behind_norm.json"
STATES = {"zeroed": "zeroed", "fitted": "fitted, untrained"}


def page() -> str:
    """Rise by text, and what the maps take and save."""
    facts = recorded(RESULTS / FILE)
    if facts is None:
        return not_yet("the cut behind a norm", "python benchmarks/behind_norm.py")
    texts = list(facts["fitted"]["verdicts"])
    rows = [
        (said, *(_cell(facts[state]["verdicts"][name]) for name in texts))
        for state, said in STATES.items()
        if facts[state] is not None
    ]
    counts = [f"{v['n_documents']} of {n}" for n, v in facts["fitted"]["verdicts"].items()]
    calibration = facts["text"]["calibration"]
    keys, values = (facts["cache_bytes_per_token"][name] for name in ("keys", "values"))
    weights, parity = facts["weights"], facts["parity"]
    past = next(value for name, value in parity.items() if name.startswith("past_windows"))
    return "\n\n".join(
        (
            table([f"{facts['model']}, {facts['fraction']:.0%} of the keys cut", *texts], rows),
            "Rise of the loss in nats per token at 256 tokens, with 99% intervals, on "
            f"{', '.join(counts)}. Fitted on {calibration['documents']} documents of "
            f"{' and '.join(calibration['texts'])} ({calibration['tokens']:,} tokens). The model "
            "that was judged is the slim one, written to a folder and read back.",
            _reached(facts),
            f"The cache shrinks from {sum(b[0] for b in (keys, values)):,} to "
            f"{sum(b[1] for b in (keys, values)):,} bytes per token (keys {keys[0]:,} to "
            f"{keys[1]:,}, float32). The weights grow from {weights['full']:,} to "
            f"{weights['slim']:,}: the maps are {weights['maps']:,} of them. Logits of slim model "
            f"and hooked original differ by at most {past:.1e} on a speech longer than every "
            f"window (the largest is {parity['largest_logit']:.3g}), and {parity['slim']:.1e} on "
            "random tokens, where 1e-4 of the largest is allowed. Ranking by `fisher` took "
            f"{facts['fisher_probe']['beyond_loaded_gb']:.2f} GB beyond the loaded model "
            f"({facts['fisher_probe']['beyond_weights_gb']:.2f} beyond its weights), with a "
            f"vocabulary of {facts['fisher_probe']['vocabulary']:,}.",
            provenance(facts, f"docs/results/{FILE}"),
        )
    )


def _cell(verdict: dict[str, Any]) -> str:
    return f"{verdict['estimate']:+.3f} ({interval(verdict['interval'])})"


def _reached(facts: dict[str, Any]) -> str:
    """One sentence: which texts reach the target, and the figure where one does not."""
    target = facts["target"]
    rises = {name: v["estimate"] for name, v in facts["fitted"]["at_target"].items()}
    over = {name: rise for name, rise in rises.items() if rise > target}
    if not over:
        return f"The target of {target:g} nats is reached on every text."
    missed = ", ".join(f"{rise:+.3f} on {name}" for name, rise in over.items())
    fit, text = facts["fit"], facts["text"]["calibration"]
    shared, heads = fit.get("heads_with_one_query_map", 0), sum(fit["ridges_chosen"].values())
    one = f" Of {heads} groups of query heads {shared} do best with one map for all." * (shared > 0)
    return (
        f"The target of {target:g} nats is missed: {missed}. The "
        f"misfit of the attention is {fit['misfit_after']:.2f} nats per query on the text that was "
        f"fitted, and {fit['held_out_after']:.2f} on one half of it for a fit to the other "
        f"({fit['held_out_before']:.2f} without a fit). Each head was fitted to "
        f"{text['tokens'] // fit['stride']:,} queries, every {fit['stride']}th.{one}"
    )
