"""What a model that is larger than memory takes, recorded by a process with a limit."""

from __future__ import annotations

from parts.markdown import RESULTS, not_yet, recorded, table

COMMAND = "python benchmarks/larger_than_memory.py --refit"


def page() -> str:
    """Seconds and peak of every stage, and the comparison with the same in memory."""
    facts = recorded(RESULTS / "larger_than_memory.json")
    if facts is None:
        return not_yet("the memory and the time", COMMAND)
    rows = [
        (
            s["stage"],
            f"{s['peak_gb']:.2f} GB",
            f"{s['seconds']:,.0f} s",
            f"{s['cpu_seconds']:,.0f} s",
        )
        for s in facts["stages"]
    ]
    small = facts["small"]
    equal = small["same_mask"] and small["same_bytes_of_slim_weights"]
    quiet = "" if facts["quiet"] else "; other processes ran, so the seconds are too many"
    return (
        table(["stage", "peak resident memory", "time", "of the processor"], rows)
        + f"\n\n{facts['model']}: {facts['n_weights'] / 1e9:.2f} billion weights, "
        f"{facts['weights_gb']:.1f} GB of {facts['stored']}, computed in {facts['computed']}; "
        f"in a memory control group of {facts['limit_gb']:g} GB, page cache included; "
        f"{facts['documents']} documents of "
        f"{facts['length']} tokens, {facts['fraction']:.0%} of the keys cut{quiet}. A small model "
        f"({small['layers']} layers of {small['d_model']}) gave "
        + ("the same mask and the same bytes" if equal else "ANOTHER RESULT")
        + f" from disk as in memory, gains within {small['largest_difference_of_gains']:.0e}. "
        f"Source: `docs/results/larger_than_memory.json`, `{COMMAND}`."
    )
