"""The verdict on the rise of the loss, measured on the same documents before and after a cut."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.stats.by_domain import judge_by_domain, overall
from gainlens.stats.verdicts import Verdict


def rise_verdicts(
    rise: Float[np.ndarray, " document"],
    fraction: float | None,
    margin: float,
    *,
    trained: bool = True,
    domains: Sequence[str] = (),
    lengths: Sequence[int] = (),
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Verdict]:
    """The verdict on paired differences of the loss for each text, by name.

    Args:
        rise: loss of the cut model minus loss of the intact model, nats per token, one per
            document.
        fraction: share of the key dimensions cut, for the wording of the claim; None if unknown.
        margin: non-inferiority margin, in nats per token.
        trained: whether the kept part was trained, for the wording of the claim.
        domains, lengths, groups: as for ``gainlens.stats.by_domain.judge_by_domain``.
    """
    how = " and the rest trained" if trained else ""
    cut = "" if fraction is None else f"with {fraction:.0%} of the key dimensions cut{how}, "
    return judge_by_domain(
        f"{cut}the loss rises by less than {margin:g} nats",
        rise,
        margin,
        domains=domains,
        lengths=lengths,
        groups=groups,
        note="paired by document with the intact model",
    )


def rise_verdict(
    rise: Float[np.ndarray, " document"], fraction: float | None, margin: float, **options: Any
) -> Verdict:
    """The worst of ``rise_verdicts``, whose arguments it takes: the verdict over all texts."""
    return overall(rise_verdicts(rise, fraction, margin, **options))
