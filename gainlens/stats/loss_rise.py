"""The verdict on the rise of a loss, measured on the same documents before and after a cut."""

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
        rise: loss of the cut model minus that of the intact one, nats per token.
        fraction: share of the key dimensions cut, for the claim's words; None where not known.
        margin: nats per token that still count as no rise.
        trained: whether the rest was trained, for the claim's words.
    """
    how = " and the rest trained" if trained else ""
    cut = "" if fraction is None else f"with {fraction:.0%} of the key dimensions cut{how}, "
    return judge(
        f"{cut}the loss rises by less than {margin:g} nats",
        rise,
        margin,
        note="paired by document with the intact model",
    )
