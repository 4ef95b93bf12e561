"""One claim on documents of one or several texts: judged on each text, and the worst decides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.stats.verdicts import Context, Verdict, judge, worst


def judge_by_domain(
    claim: str,
    differences: Float[np.ndarray, " document"],
    margin: float,
    *,
    domains: Sequence[str] = (),
    lengths: Sequence[int] = (),
    groups: Sequence[Hashable] | None = None,
    note: str = "",
) -> dict[str, Verdict]:
    """The verdict on every text by name, each with the context of its own documents.

    Args:
        claim: the claim in words.
        differences: damage to each document, nats per token.
        margin: non-inferiority margin, set before the differences were seen, above 0.
        domains: the name of each document's text; empty for one text without a name.
        lengths: tokens of each document; empty if unknown, the verdict then has no context.
        groups: a label per document, equal for documents that depend on each other (windows of
            one text); they count as one.
        note: as for ``judge``.

    Returns:
        One entry per name, in order of first appearance; the name is empty where none was given.

    Raises:
        InputError: as for ``judge``; not one domain, length or group per document.

    Example:
        >>> found = judge_by_domain("half can go", rise, 0.02, domains=tokens.domains)
        >>> gl.stats.worst(found).status
    """
    n = len(differences)
    for name, values in (("domains", domains), ("lengths", lengths), ("groups", groups or ())):
        if len(values) not in (0, n):
            raise InputError(f"{name} has {len(values)} entries: expected one per document ({n})")
    found: dict[str, Verdict] = {}
    for name in dict.fromkeys(domains) or ("",):
        rows = [i for i in range(n) if not domains or domains[i] == name]
        found[name] = judge(
            claim,
            differences[rows],
            margin,
            groups=None if groups is None else [groups[i] for i in rows],
            domain=(name,) if name else (),
            context=Context.of([lengths[i] for i in rows]) if lengths else None,
            note=note,
        )
    return found


def overall(verdicts: dict[str, Verdict]) -> Verdict:
    """The verdict on all texts together: the only one, or the worst."""
    return worst(verdicts) if len(verdicts) > 1 else next(iter(verdicts.values()))


def judged(*args: Any, **kwargs: Any) -> Verdict:
    """``overall`` of ``judge_by_domain``; same arguments and errors."""
    return overall(judge_by_domain(*args, **kwargs))
