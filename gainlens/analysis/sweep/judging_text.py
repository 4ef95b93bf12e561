"""Keep evaluation text separate from text that was used to choose a cut, even in part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.evaluator import Evaluator, TextLosses
from gainlens.data.batches import Tokens
from gainlens.data.overlap import check_overlap, document_identities
from gainlens.probes.gains import KeyGains, check_same_weights


def check_judge(
    documents: Sequence[torch.Tensor],
    gains: KeyGains | None,
    cuts: Iterable[Cut] = (),
    tokenizer: Any | None = None,
) -> None:
    """Reject text if it, or a large part of it, was used for the gains or for one of the cuts.

    Args:
        documents: the evaluation text, as batches ``[document, pos]`` or documents ``[pos]``.
        gains: the gains used to choose the cut.
        cuts: further cuts; cuts made by hand have no text.
        tokenizer: tokenizer of the model.

    Raises:
        InputError: see ``gainlens.data.overlap.check_overlap``.
    """
    texts = set() if gains is None else set(gains.texts)
    known = set() if gains is None else set(gains.documents)
    for cut in cuts:
        more_texts, more_documents = cut.chosen_on()
        texts |= more_texts
        known |= more_documents
    check_overlap(documents, known, texts=texts, tokenizer=tokenizer)


def text_that_judges(
    evaluator: Evaluator, tokens: Tokens, gains: KeyGains, cuts: Iterable[Cut] = ()
) -> TextLosses:
    """The losses on evaluation text, after checking that it was not used for any choice.

    Args:
        evaluator: the ``Evaluator`` of the model.
        tokens: the text.
        gains: the gains used to choose the cut.
        cuts: as for ``check_judge``.

    Raises:
        InputError: gains of another model, or text that was used for a choice.
    """
    check_same_weights(gains.model, evaluator.fingerprint)
    text = evaluator.on(tokens)
    check_judge(text.documents, gains, cuts, getattr(evaluator.model, "tokenizer", None))
    return text


def text_that_chooses(evaluator: Evaluator, tokens: Tokens, judge: TextLosses) -> TextLosses:
    """The losses on a text for choosing, after checking that it differs from the evaluation text.

    Raises:
        InputError: the text shares documents with ``judge``.
    """
    text = evaluator.on(tokens)
    tokenizer = getattr(evaluator.model, "tokenizer", None)
    known = document_identities(judge.documents, tokenizer)
    check_overlap(
        text.documents, known, texts=(judge.text,), tokenizer=tokenizer, did="is to judge"
    )
    return text
