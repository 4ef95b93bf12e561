"""What the checkpoints of the worth ledger cost, loaded from their folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from healing_text import LENGTHS, SEEN, TEXTS, training_text
from slots import Intact, apart, described
from transformers.cache_utils import DynamicCache

import gainlens as gl
from gainlens.analysis.damage_by_position import judge_by_position
from gainlens.data.batches import TOKENS_PER_BATCH, batches
from gainlens.data.overlap import document_identities
from gainlens.data.texts import Texts
from gainlens.export.judging import token_losses
from gainlens.model.fast_copy import family_head
from gainlens.model.forward import cross_entropy
from gainlens.stats.verdicts import MARGIN

UNSEEN = "docstrings"
"""Text from which nothing was learned, with more documents than ``pydoc`` has."""
BLOCK = 32
"""Numbers that share a scale in llama.cpp's q8_0."""


class RoundedCache(DynamicCache):
    """Keys and values as a cache in q8_0 gives them back: int8 with a half-precision scale."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kw: Any):
        """Round what is written; the rest is transformers'."""
        return super().update(q8_0(key_states), q8_0(value_states), layer_idx, *args, **kw)


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """Round blocks of 32 numbers of the last axis; what is left of a head is a block of its own.

    llama.cpp itself takes only heads that are whole blocks.
    """
    return torch.cat([_rounded(part) for part in x.split(BLOCK, -1)], -1)


def _rounded(blocks: torch.Tensor) -> torch.Tensor:
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().to(blocks)
    return (blocks / scale.clamp_min(1e-12)).round().clamp(-127, 127) * scale


@torch.inference_mode()
def rounded_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """``token_losses`` of a model whose cache is kept in q8_0."""
    cache = RoundedCache(config=model.config)
    hidden = model.base_model(input_ids=tokens, past_key_values=cache).last_hidden_state
    return cross_entropy(family_head(model), hidden, tokens)


def texts_that_judge(
    tokenizer: Any, short: int, long: int, longest: int, calibration: int
) -> dict[str, Texts]:
    """Validation documents by context that share no text with what chose or trained."""
    used_texts: list[torch.Tensor] = []
    for texts, names in TEXTS.items():
        used_texts += training_text(texts, tokenizer)
        used_texts += gl.load_tokens(names, tokenizer, n_docs=calibration, length=LENGTHS)
    used = document_identities(used_texts, tokenizer)
    found = {}
    for name, length, n_docs in (
        ("256", 256, short),
        ("2048", 2048, long),
        ("8192", 8192, longest),
    ):
        if not n_docs:
            continue
        parts = []
        for text in (*SEEN.split(","), UNSEEN):
            if text == UNSEEN and length > 256:
                continue  # it has hardly any document of this length
            every = gl.load_tokens(
                text, tokenizer, n_docs="all", length=[length], split="validation"
            )
            parts += [(row, text) for row in list(every)[:n_docs]]
        rows = Texts(
            tuple(row for row, _ in parts),
            tuple(text for _, text in parts),
            tuple(range(len(parts))),
        )
        found[name] = rows.chosen(apart(rows, used, tokenizer))
    return found


def intact_losses(model: Any, text: Texts, work: Path) -> list[torch.Tensor]:
    """Next-token losses of the model that was cut, per batch of a text; kept in ``work``."""
    intact = Intact(partial(token_losses, model), work / f"intact_{max(text.lengths)}.safetensors")
    known = len(intact.known)
    found = [intact(run) for run in runs_of(model, text)]
    if len(intact.known) > known:
        intact.save()
    return found


def runs_of(model: Any, text: Texts) -> list[torch.Tensor]:
    """The batches of a text, in order."""
    return list(batches(list(text), int(model.config.vocab_size), TOKENS_PER_BATCH))


def judged(
    model: Any,
    before: list[torch.Tensor],
    text: Texts,
    fraction: float,
    *,
    rounded: bool,
    trained: bool,
) -> dict[str, Any]:
    """Verdict and rise by position at one context; every text is judged, and the worst decides."""
    read = partial(rounded_losses if rounded else token_losses, model)
    runs = runs_of(model, text)
    after = [read(run) for run in runs]
    verdict, by_position = judge_by_position(
        text, runs, (after, before), fraction, MARGIN, name="model", trained=trained
    )
    rise = np.concatenate(
        [(a.double().mean(1) - b.double().mean(1)).numpy()
         for a, b in zip(after, before, strict=True)]
    )  # fmt: skip
    of = np.array(text.domains)
    return {
        "verdict": verdict.to_json(),
        "by_text": {one: float(rise[of == one].mean()) for one in text.names},
        "by_position": by_position.table(),
    }


def about(texts: dict[str, Texts]) -> dict[str, Any]:
    """Names, sizes and fingerprints."""
    return {name: described(text) for name, text in texts.items()}
