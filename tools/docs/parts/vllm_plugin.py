"""The page on serving with vLLM."""

from __future__ import annotations

from typing import Any

from parts.markdown import RESULTS, not_yet, provenance, recorded, table

FILE = "engines_vllm_plugin.json"
WHAT = {
    "layer": "half of the pairs of each layer, sets per head",
    "slots": "one set of slots, half of the pairs",
}


def page() -> str:
    """Tokens against gainlens' own engine, the GPU attention without a GPU, what was not run."""
    facts = recorded(RESULTS / FILE)
    if facts is None:
        return not_yet(f"docs/results/{FILE}", "make engines")
    rows, text = facts["rows"], facts["text"]
    lengths, settings = text["lengths"], facts["settings"]
    compared = [
        (f"{facts['model']}, {WHAT[n]}", rows[n]) for n in WHAT if "version" in rows.get(n, {})
    ]
    version = compared[0][1]["version"] if compared else "vLLM"
    caching = [found["prompts_with_cached_opening"] for _, found in compared]
    small = {f"random {n}": f for n, f in rows.get("families", {}).get("families", {}).items()}
    if "compiled" in rows:
        small["random llama, compiled by torch.compile"] = rows["compiled"]
    for name in ("divided", "replicated"):
        if name in rows.get("parallel", {}):
            small[f"random llama, two ranks, key heads {name}"] = rows["parallel"][name]
    parts = [
        f"{text['prompts']} prompts of {min(lengths)} to {max(lengths)} tokens ({text['name']}, "
        f"{text['split']}) go to {version} at once, in steps of at most "
        f"{settings['max_num_batched_tokens']} tokens, so prompts are prefilled in chunks between "
        f"the tokens of others. Prefix caching is on, and hits in {_span(caching)} of them. "
        f"{facts['new_tokens']} greedy tokens each, float32, on a CPU; the random models have 8 "
        f"prompts and 16 tokens. Reference: {facts['reference']}, one prompt at a time. "
        f"Target: log-probabilities within {facts['targets']['logprob']:g} and "
        f"{facts['targets']['greedy']}.",
        table(
            ["folder", "prompts", "log-probabilities compared", "largest difference",
             "prompts whose greedy tokens differ"],
            [_row(name, found) for name, found in [*compared, *small.items()]],
        ),
    ]  # fmt: skip
    if compared:
        head = [
            "folder",
            "key widths",
            "values",
            "of the cache, on a CPU",
            "on a GPU (by its widths)",
        ]
        widths = [
            (name, _span(f["key_widths"]), _span(f["value_widths"]),
             f"{f['cache_share_cpu']:.3f}", f"{f['cache_share_gpu']:.3f}")
            for name, f in compared
        ]  # fmt: skip
        parts.append(table(head, widths))
    if served := rows.get("serve"):
        same = "the same text as" if served["passed"] else "another text than"
        parts.append(
            f"`{served['command']}` answered one completion over HTTP with {same} gainlens."
        )
    if found := rows.get("triton"):
        parts.append(_triton(found))
    parts += [
        f"**Not run** ({facts['not_run']['why']}):",
        table(
            ["what", "command"],
            [(what, f"`{command}`") for what, command in facts["not_run"]["commands"].items()],
        ),
        provenance(facts, f"docs/results/{FILE}"),
    ]
    return "\n\n".join(parts)


def _row(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
    return (
        name,
        found["prompts"],
        found["logprobs_compared"],
        f"{found['largest_logprob_difference']:.1e}",
        len(found["different_rows"]),
    )


def _triton(found: dict[str, Any]) -> str:
    pairs = ", ".join(f"{row['keys']}/{row['values']}" for row in found["compiled"])
    served = "; ".join(
        f"{name}: {row['largest_logprob_difference']:.1e}, other tokens in "
        f"{len(row['different_rows'])} of {row['prompts']} prompts"
        for name, row in found["engines"].items()
    )
    return (
        "The GPU attention without a GPU: in Triton's interpreter, over pages, ragged batches, "
        f"prefill, decode and a window, it is within {found['largest_error']:.1e} of float64 "
        "attention. Engines that serve three layers with keys of different width through it "
        f"differ by little ({served}). It compiles for {found['compiled'][0]['target']} with keys "
        f"and values of {pairs}."
    )


def _span(values: list[int]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
