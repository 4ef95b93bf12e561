"""Text that chose a cut can't judge it: not the whole of it, and not a part of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.evaluator import Evaluator, TextLosses
from gainlens.data.batches import Tokens
from gainlens.data.document_identity import document_marks, text_fingerprint
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains, check_same_weights

SHARED = 0.1
"""Share of documents in common from which it is no accident. Two splits of one source may hold a
few equal openings (licences, salutations); these are worth a warning."""


def check_judge(
    documents: Sequence[torch.Tensor], gains: KeyGains | None, cuts: Iterable[Cut] = ()
) -> None:
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
    texts = set() if gains is None else set(gains.texts)
    marks = set() if gains is None else set(gains.documents)
    for cut in cuts:
        more_texts, more_marks = cut.chosen_on()
        texts |= more_texts
        marks |= more_marks
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


def text_that_judges(
    evaluator: Evaluator, tokens: Tokens, gains: KeyGains, cuts: Iterable[Cut] = ()
) -> TextLosses:
    """The losses on a text, after checking that it chose nothing.

    Args:
        evaluator: of the model.
        tokens: the text.
        gains: that chose what is cut.
        cuts: as for ``check_judge``.

    Raises:
        InputError: gains of another model, or text that chose.
    """
    check_same_weights(gains.model, evaluator.fingerprint)
    text = evaluator.on(tokens)
    check_judge(text.documents, gains, cuts)
    return text


def text_that_chooses(evaluator: Evaluator, tokens: Tokens, judge: TextLosses) -> TextLosses:
    """The losses on a text that may choose: not the one that judges.

    Raises:
        InputError: it shares documents with ``judge``.
    """
    text = evaluator.on(tokens)
    marks = set(document_marks(text.documents)) & set(document_marks(judge.documents))
    if text.text == judge.text or marks:
        raise InputError(
            "the text that chooses shares documents with the one that judges: expected others"
        )
    return text
