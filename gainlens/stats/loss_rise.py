"""The verdict on the rise of a loss, measured on the same documents before and after a cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from gainlens.stats.intervals import documents_by_scaling
from gainlens.stats.stopping import skew_interval
from gainlens.stats.verdicts import Verdict, non_inferiority


def rise_verdict(
    rise: Float[np.ndarray, " document"],
    fraction: float | None,
    margin: float,
    level: float = 0.95,
    *,
    trained: bool = True,
) -> Verdict:
    """The verdict on paired differences of the loss, one per document.

    Args:
        rise: loss of the cut model minus that of the intact one, nats per token.
        fraction: share of the key dimensions cut, for the claim's words; None where not known.
        margin: nats per token that still count as no rise.
        level: coverage of the interval over documents.
        trained: whether the rest was trained, for the claim's words.
    """
    how = " and the rest trained" if trained else ""
    cut = "" if fraction is None else f"with {fraction:.0%} of the key dimensions cut{how}, "
    mean, interval = float(rise.mean()), skew_interval(rise, level)
    verdict = non_inferiority(
        f"{cut}the loss rises by less than {margin:g} nats",
        mean,
        interval,
        margin,
        len(rise),
        note="paired by document with the intact model",
        more_documents=0,
    )
    if verdict.status != "undecided":
        return verdict
    return replace(verdict, more_documents=documents_by_scaling(interval, mean, margin, len(rise)))
