"""The verdict on the rise of the loss, measured on the same documents before and after a cut."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from gainlens.stats.verdicts import Verdict, judge


def rise_verdict(
    rise: Float[np.ndarray, " document"],
    fraction: float | None,
    margin: float,
    *,
    trained: bool = True,
) -> Verdict:
    """The verdict on paired differences of the loss, one per document.

    Args:
        rise: loss of the cut model minus loss of the intact model, nats per token.
        fraction: share of the key dimensions cut, for the wording of the claim; None if unknown.
        margin: non-inferiority margin, in nats per token.
        trained: whether the kept part was trained, for the wording of the claim.
    """
    how = " and the rest trained" if trained else ""
    cut = "" if fraction is None else f"with {fraction:.0%} of the key dimensions cut{how}, "
    return judge(
        f"{cut}the loss rises by less than {margin:g} nats",
        rise,
        margin,
        note="paired by document with the intact model",
    )
