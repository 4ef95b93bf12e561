"""Text that chose a cut can't judge it: not the whole of it, and not a part of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.document_identity import document_marks, text_fingerprint
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains

Cut = KeyMask | RefitCut

SHARED = 0.1
"""Share of documents in common from which it is no accident. Two splits of one source may hold a
few equal openings (licences, salutations); these are worth a warning."""


def check_judge(documents: Sequence[torch.Tensor], gains: KeyGains, cuts: Iterable[Cut]) -> None:
    """Refuse text that also went into the gains or into one of the cuts, or a good part of which.

    Args:
        documents: the text that judges, as batches ``[document, pos]`` or documents ``[pos]``.
        gains: that chose what is cut.
        cuts: further cuts; those made by hand know of no text.

    Raises:
        InputError: it is the same text, or two documents or more and above a tenth are the same.

    Warns:
        UserWarning: fewer are.
    """
    texts, marks = set(gains.texts), set(gains.documents)
    for cut in cuts:
        for facts in (cut.facts, cut.mask.facts if isinstance(cut, RefitCut) else {}):
            texts |= {facts["text"]} if "text" in facts else set()
            texts |= _strings(facts, "texts")
            marks |= _strings(facts, "documents")
    if text_fingerprint(documents) in texts:
        raise InputError(
            "tokens are the text that the gains were gathered on or a cut was made on: text that "
            "chose a cut can't judge it (load_tokens(..., split='validation') gives other text)"
        )
    n_documents = sum(len(item) if item.ndim == 2 else 1 for item in documents)
    shared = sum(mark in marks for mark in document_marks(documents))
    if shared > max(1, SHARED * n_documents) or (shared and shared == n_documents):
        raise InputError(
            f"tokens: {shared} of {n_documents} documents are of the text that the gains were "
            "gathered on or a cut was made on: text that chose a cut can't judge it "
            "(load_tokens(..., split='validation') gives other documents)"
        )
    if shared:
        warnings.warn(
            f"{shared} of {n_documents} documents of tokens also chose the cut that they judge",
            stacklevel=3,
        )


def _strings(facts: dict[str, Any], name: str) -> set[str]:
    found = facts.get(name)
    return set(found) if isinstance(found, list | tuple) else set()
