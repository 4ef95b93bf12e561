"""The page on the slim model: counted, predicted and measured, in gainlens' own engine."""

from __future__ import annotations

from typing import Any

from parts.ledgers import anything
from parts.markdown import RESULTS, not_yet, number, provenance, recorded, table

COMMAND = "make acceptance"


def page() -> str:
    """What half of the keys is worth, and what cutting a larger model costs."""
    file = RESULTS / "slim_ledger.json"
    facts = recorded(file)
    parts = [not_yet(f"docs/results/{file.name}", COMMAND)] if facts is None else _page(facts)
    big = RESULTS / "slim_ledger_size_check.json"
    found = recorded(big)
    parts.append("## Cutting a model of 1.1 billion parameters")
    parts.append(
        not_yet(f"docs/results/{big.name}", COMMAND) if found is None else anything(found, big)
    )
    return "\n\n".join(parts)


def _page(facts: dict[str, Any]) -> list[str]:
    plan, parity = facts["plan"], facts["parity"]
    chosen = plan["facts"]
    return [
        f"{facts['name']} with {plan['keys_kept']:.0%} of its key dimensions (ranked by "
        f"{chosen['score']}, scope {chosen['scope']}), {facts['dtype']}, batch {facts['batch']}. "
        "All models take turns in one run.",
        "## What is saved",
        _saved(facts),
        "## Decoding",
        "Tokens per second with the given number of tokens in the cache. *Predicted* is the ratio "
        "of the bytes that one token reads. *transformers* is the original model with its fastest "
        "attention setting. *full, here* is the original model with the kernels of gainlens.",
        _decode(facts["contexts"]),
        f"**Can decoding become twice as fast?** {_limit(facts)}",
        "## Prefill",
        "Prompt tokens per second. *Predicted* is the ratio of the operation counts.",
        _prefill(facts["contexts"]),
        "## Numerical agreement",
        "Largest difference of a logit between the slim model and the masked original (the largest "
        f"logit is {number(parity['largest_logit'])}). In float64 the difference vanishes, so it "
        "is float32 rounding. The original model with PyTorch's attention differs as much from "
        "its own float64 result.",
        _rounding(parity["rounding"]),
        provenance(facts, "docs/results/slim_ledger.json"),
    ]


def _saved(facts: dict[str, Any]) -> str:
    names = {
        "parameters": "parameters",
        "key_bytes": "bytes of keys per token",
        "value_bytes": "bytes of values per token",
        "flops": "operations per token",
        "flops_per_position": "operations per token and position of the context",
    }
    rows = [
        (said, facts["full"][name], facts["slim"][name],
         f"{1 - facts['slim'][name] / facts['full'][name]:.1%}")
        for name, said in names.items()
    ]  # fmt: skip
    return table(["counted", "full", "slim", "saved"], rows)


def _decode(rows: list[dict[str, Any]]) -> str:
    rate = "decode_tokens_per_second"
    head = ["context", "transformers", "full, here", "slim", "slim / transformers", "slim / full",
            "predicted"]  # fmt: skip
    body = []
    for row in rows:
        timed, best = row["measured"], row["best_transformers"]
        body.append(
            (row["context"], f"{timed[best][rate]:.1f} ({best.removeprefix('transformers ')})",
             f"{timed['full'][rate]:.1f}", f"{timed['slim'][rate]:.1f}",
             f"× {row['decode_ratio_to_best_transformers']:.2f}", f"× {row['decode_ratio']:.2f}",
             f"× {row['predicted']['decode_ratio']:.2f}")
        )  # fmt: skip
    return table(head, body)


def _prefill(rows: list[dict[str, Any]]) -> str:
    rate = "prefill_tokens_per_second"
    head = ["context", "full, here", "slim", "slim / transformers", "slim / full", "predicted"]
    body = [
        (row["context"], f"{row['measured']['full'][rate]:.0f}",
         f"{row['measured']['slim'][rate]:.0f}",
         f"× {row['prefill_ratio_to_best_transformers']:.2f}", f"× {row['prefill_ratio']:.2f}",
         f"× {row['predicted']['prefill_ratio']:.2f}")
        for row in rows
    ]  # fmt: skip
    return table(head, body)


def _rounding(rows: list[dict[str, Any]]) -> str:
    names = {
        "slim to masked, float32": "slim to masked, float32",
        "slim to masked, float64": "the same, float64",
        "slim float32 to float64": "slim, float32 to float64",
        "original with sdpa, float32 to float64": "original, float32 to float64",
    }
    # A record of before the scopes had one name each says "shared".
    body = [
        (row["plan"].replace("one shared set", "one universal set"), *map(row.get, names))
        for row in rows
    ]
    return table(["plan", *names.values()], body)


def _limit(facts: dict[str, Any]) -> str:
    """Why the ratio is bounded, from the numbers of the record."""
    found = facts["twice_as_fast"]
    if found["from_context"] is not None:
        return f"Yes, from a context of {found['from_context']:,} tokens on, by the bytes read."
    keys, values = facts["full"]["key_bytes"], facts["full"]["value_bytes"]
    left = (facts["slim"]["key_bytes"] + facts["slim"]["value_bytes"]) / (keys + values)
    return (
        f"No. Keys are {keys / (keys + values):.0%} of the cache, and this plan leaves "
        f"{left:.0%} of the cache, so the ratio stays below {found['limit']:.2f} at any context. "
        "A factor of two needs a cut of more than half of keys and values together, and a context "
        "whose cache outweighs the weights: with a quarter of both left, "
        f"{found['with_a_quarter_left_from_context']:,} tokens at batch {facts['batch']}."
    )
