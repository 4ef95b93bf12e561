"""One claim on documents of one or several texts: judged on each text, and the worst decides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.errors import InputError
from gainlens.stats.several_claims import judge_together
from gainlens.stats.verdicts import Context, Verdict, worst


def judge_claims(
    claims: Sequence[Mapping[str, Any]],
    *,
    domains: Sequence[str] = (),
    lengths: Sequence[int] = (),
    groups: Sequence[Hashable] | None = None,
) -> list[dict[str, Verdict]]:
    """The verdicts on several claims about the same documents, for every text by name.

    On each text the claims are corrected together (``judge_together``).

    Args:
        claims: arguments of ``gainlens.stats.verdicts.judge`` by name: ``claim``,
            ``differences``, ``margin`` and optionally ``note``.
        domains: the name of each document's text; empty for one text without a name.
        lengths: tokens of each document; empty if unknown, a verdict then has no context.
        groups: a label per document, equal for documents that depend on each other (windows of
            one text); they count as one.

    Returns:
        For each claim one entry per name, in order of first appearance; the name is empty where
        none was given.

    Raises:
        InputError: as for ``judge``; not one domain, length or group per document.
    """
    n = len(claims[0]["differences"]) if claims else 0
    for name, values in (("domains", domains), ("lengths", lengths), ("groups", groups or ())):
        if len(values) not in (0, n):
            raise InputError(f"{name} has {len(values)} entries: expected one per document ({n})")
    found: list[dict[str, Verdict]] = [{} for _ in claims]
    for name in dict.fromkeys(domains) or ("",):
        rows = [i for i in range(n) if not domains or domains[i] == name]
        where = {
            "groups": None if groups is None else [groups[i] for i in rows],
            "domain": (name,) if name else (),
            "context": Context.of([lengths[i] for i in rows]) if lengths else None,
        }
        here = [{**c, "differences": np.asarray(c["differences"])[rows], **where} for c in claims]
        for one, verdict in zip(found, judge_together(here), strict=True):
            one[name] = verdict
    return found


def judge_by_domain(
    claim: str,
    differences: Float[np.ndarray, " document"],
    margin: float,
    *,
    note: str = "",
    **where: Any,
) -> dict[str, Verdict]:
    """The verdict on one claim for every text by name, each with the context of its documents.

    Args:
        claim: the claim in words.
        differences: damage to each document, nats per token.
        margin: non-inferiority margin, set before the differences were seen, above 0.
        note: as for ``judge``.
        where: ``domains``, ``lengths``, ``groups``; see ``judge_claims``.

    Raises:
        InputError: as for ``judge_claims``.

    Example:
        >>> rise = np.random.default_rng(0).normal(0.0, 0.01, 144)  # nats, one per document
        >>> found = judge_by_domain("half can go", rise, 0.02, domains=["code", "prose"] * 72)
        >>> {name: verdict.status for name, verdict in found.items()}
        {'code': 'holds', 'prose': 'holds'}
        >>> worst(found).status
        'holds'
    """
    asked = {"claim": claim, "differences": differences, "margin": margin, "note": note}
    return judge_claims([asked], **where)[0]


def overall(verdicts: dict[str, Verdict]) -> Verdict:
    """The verdict on all texts together: the only one, or the worst."""
    return worst(verdicts) if len(verdicts) > 1 else next(iter(verdicts.values()))


def judged(*args: Any, **kwargs: Any) -> Verdict:
    """``overall`` of ``judge_by_domain``; same arguments and errors."""
    return overall(judge_by_domain(*args, **kwargs))
