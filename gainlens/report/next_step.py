"""What to do after reading the claims."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from gainlens.report.claims import Claim
from gainlens.stats.verdicts import ENOUGH

MOST = 4 * ENOUGH
"""Documents of each text that are worth asking for; beyond, the cut is too close to its bound."""


@dataclass(frozen=True)
class NextStep:
    """A sentence, and the verb of the command line that it asks for.

    Attributes:
        why: the sentence.
        verb: the verb.
        n_docs: documents from each split that it needs; None for the verb's own number.
    """

    why: str
    verb: str
    n_docs: int | None = None

    def command(self, model: str, text: str) -> str:
        """The command.

        Args:
            model, text: names as on the command line.
        """
        words = ["gainlens", self.verb, "--model", model, "--text", text]
        return shlex.join(words + (["--n-docs", str(self.n_docs)] if self.n_docs else []))


def next_step(claims: Sequence[Claim], best: Claim | None) -> NextStep:
    """What the verdict on the cut of half, as good as it gets without training, asks for.

    Args:
        claims: the first is the one on half of the key dimensions.
        best: the best cut without training; None if it was not run.
    """
    verdict = (best or claims[0]).verdict
    if verdict.status.startswith("holds"):
        return NextStep(
            "The cut of half holds without training: make the model physically smaller.", "slim"
        )
    # An extrapolation from few documents says little: first as many as any verdict needs.
    each = ENOUGH
    if verdict.n_documents >= ENOUGH:
        each = verdict.n_documents + (verdict.more_documents or 0)
    if verdict.status == "undecided" and verdict.n_documents < each <= MOST:
        # The worst text decides, so each needs enough documents.
        texts = max(1, len(verdict.domain))
        of_one, of_each = (" of one text", " of each text") if texts > 1 else ("", "")
        why = (
            f"Undecided on {verdict.n_documents} documents{of_one}: judge the cut on {each}"
            f"{of_each}."
        )
        return NextStep(why, "report", each * texts)
    return NextStep(
        "The cut of half is not shown to be free without training: heal it, then slim the model.",
        "train",
    )
