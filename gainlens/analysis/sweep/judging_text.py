"""Text that chose a cut can't judge it: not the whole of it, and not a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.overlap import check_overlap
from gainlens.probes.gains import KeyGains

Cut = KeyMask | RefitCut


def check_judge(
    documents: Sequence[torch.Tensor],
    gains: KeyGains,
    cuts: Iterable[Cut],
    tokenizer: Any | None = None,
) -> None:
    """Refuse text that also went into the gains or into one of the cuts, or a good part of which.

    Args:
        documents: the text that judges, as batches ``[document, pos]`` or documents ``[pos]``.
        gains: that chose what is cut.
        cuts: further cuts; those made by hand know of no text.
        tokenizer: the model's.

    Raises:
        InputError: see ``gainlens.data.overlap.check_overlap``.
    """
    texts, known = set(gains.texts), set(gains.documents)
    for cut in cuts:
        for facts in (cut.facts, cut.mask.facts if isinstance(cut, RefitCut) else {}):
            texts |= {facts["text"]} if "text" in facts else set()
            texts |= _strings(facts, "texts")
            known |= _strings(facts, "documents")
    check_overlap(documents, known, texts=texts, tokenizer=tokenizer)


def _strings(facts: dict[str, Any], name: str) -> set[str]:
    found = facts.get(name)
    return set(found) if isinstance(found, list | tuple) else set()
