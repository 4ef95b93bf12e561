"""``refit``: fit what a cut keeps to the attention logits of the intact model, without training.

No gradient of the loss is taken: the maps are least-squares fits of the attention logits
(``gainlens.ablation.least_squares``), of every head by itself, on the queries and keys of the
intact model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gainlens.ablation.fit_passes import fit_in_passes
from gainlens.ablation.fitting import RIDGES, Settings, calibration, text_facts
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.recorded_attention import record_attention
from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.batches import Tokens
from gainlens.errors import InputError
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import check_intact


def refit(
    model: Any,
    tokens: Tokens,
    mask: KeyMask,
    *,
    rounds: int = 6,
    iterations: int = 6,
    ridge: float | Sequence[float] = RIDGES,
    uniform: float = 0.2,
    stride: int | None = None,
    passes: int = 1,
    progress: bool = True,
) -> RefitCut:
    """Fit the kept query and key dimensions to the intact attention logits, without training.

    Half of the documents, drawn at random, choose for each key head the ridge, the number of rounds
    and whether its query heads share one map, of a fit to the others; all of them are fitted then.
    Where no fit is better than plain selection on text that it has not seen, the head keeps plain
    selection.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: calibration text, documents of any lengths, as long and of the domains that the cut
            is for; 64 tokens per dimension of a head or more. What is recorded of it goes to disk
            beyond 1 GiB.
        mask: what stays; no rotary pair may be split.
        rounds: how often queries and keys are solved in turn, at most.
        iterations: conjugate-gradient steps of each solve.
        ridge: pull towards plain selection, relative to the mean curvature; of several, held-out
            text chooses.
        uniform: share of the weights that is spread evenly over the keys, 0 to 1, so that keys
            which hardly get attention now are not free to get it after.
        stride: every how many positions a query is fitted (all keys are); by default 2, or more
            where the text would give a head more than 4,096 queries.
        passes: 2 or more fit every layer again, on the queries and keys that the model with the
            fit so far gives it, since errors add up through the layers.
        progress: show a progress bar over layers.

    Returns:
        RefitCut: its ``facts`` hold the mean misfit of the attention (about nats of
        Kullback-Leibler divergence per query) before and after, on all text and held out.

    Raises:
        InputError: a split pair, another shape, a setting out of range.
        UnsupportedModelError: attention that is more than causal with one scale, a window and a
            soft cap (a position bias), which the fit does not describe.
    """
    settings = Settings(rounds, iterations, ridge, uniform, stride, passes)
    sites = key_sites(model)
    if mask.shape != sites.shape:
        raise InputError(f"mask has shape {mask.shape}: this model has {sites.shape}")
    if not mask.whole_pairs(sites.partner):
        raise InputError("mask splits a rotary pair: refit keeps or cuts whole pairs")
    check_intact(model, "refit")
    documents = calibration(model, tokens, sites.d_head)
    facts = {"method": "least squares on attention logits", **text_facts(model, documents)}
    spacing = settings.spacing([len(d) for d in documents])
    select = torch.eye(sites.d_head, dtype=torch.float32)

    def plain(layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = select[mask.keep[layer, head]]
        return rows.expand(sites.group_size, -1, -1).clone(), rows

    with record_attention(model, documents, spacing, progress=progress) as record:
        found = fit_in_passes(
            model, documents, record, mask.keep, None, plain,
            lambda found: RefitCut(mask, found.queries, found.keys),
            settings, progress, "refit",
        )  # fmt: skip
    return RefitCut(mask, found.queries, found.keys, {**facts, **found.facts(settings, spacing)})
