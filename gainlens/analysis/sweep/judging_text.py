"""Text that chose a cut can't judge it: not the whole of it, and not a part of it."""

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
    """Refuse text that also went into the gains or into one of the cuts, or a good part of which.

    Args:
        documents: the text that judges, as batches ``[document, pos]`` or documents ``[pos]``.
        gains: that chose what is cut.
        cuts: further cuts; those made by hand know of no text.
        tokenizer: the model's.

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
    check_judge(text.documents, gains, cuts, getattr(evaluator.model, "tokenizer", None))
    return text


def text_that_chooses(evaluator: Evaluator, tokens: Tokens, judge: TextLosses) -> TextLosses:
    """The losses on a text that may choose: not the one that judges.

    Raises:
        InputError: it shares documents with ``judge``.
    """
    text = evaluator.on(tokens)
    tokenizer = getattr(evaluator.model, "tokenizer", None)
    known = document_identities(judge.documents, tokenizer)
    check_overlap(
        text.documents, known, texts=(judge.text,), tokenizer=tokenizer, did="is to judge"
    )
    return text
