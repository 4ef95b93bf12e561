"""The ledger of the slim model: counted, predicted and measured, in gainlens' own engine."""

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
    parts.append("## Cutting a model of 1.1 billion weights")
    parts.append(
        not_yet(f"docs/results/{big.name}", COMMAND) if found is None else anything(found, big)
    )
    return "\n\n".join(parts)


def _page(facts: dict[str, Any]) -> list[str]:
    plan, parity = facts["plan"], facts["parity"]
    chosen = plan["facts"]
    return [
        f"{facts['name']} with {plan['keys_kept']:.0%} of its keys (ranked by {chosen['score']}, "
        f"scope {chosen['scope']}), {facts['dtype']}, batch {facts['batch']}; all contenders in "
        "turns, in one run.",
        "## What is saved",
        _saved(facts),
        "## Decoding",
        "Tokens per second with so many tokens in the cache. *Predicted* is the ratio of the bytes "
        "that a token reads; *transformers* is the untouched model at its best attention setting.",
        _decode(facts["contexts"]),
        f"**Could it double?** {_sentence(facts['twice_as_fast']['verdict'])}",
        "## Prefill",
        "Tokens per second of a prompt. *Predicted* is the ratio of the operations.",
        _prefill(facts["contexts"]),
        "## The same numbers?",
        f"Largest difference of a logit between the slim model and the masked original (the "
        f"largest logit is {number(parity['largest_logit'])}), and how much of it is float32: in "
        "float64 it is gone, and the original differs as much from its own float64 when PyTorch "
        "computes its attention.",
        _rounding(parity["rounding"]),
        provenance(facts, "docs/results/slim_ledger.json"),
    ]


def _saved(facts: dict[str, Any]) -> str:
    names = {
        "parameters": "weights",
        "key_bytes": "bytes of keys per token",
        "value_bytes": "bytes of values per token",
        "flops": "operations per token",
        "flops_per_position": "operations per token and position of context",
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
    body = [(row["plan"], *(row.get(name) for name in names)) for row in rows]
    return table(["plan", *names.values()], body)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
