"""``refit``: fit what a cut keeps to the attention logits of the intact model, without training.

No gradient of the loss is taken: the maps are least-squares fits of the attention logits
(``gainlens.ablation.least_squares``), of every head by itself, on the queries and keys of the
intact model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.least_squares import Problem, fit_maps, misfit
from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.overlap import document_identities
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached, check_intact
from gainlens.model.recorder import query_key_hooks
from gainlens.model.rotation import Turn
from gainlens.model.running import is_exact
from gainlens.model.sites import Stage
from gainlens.model.tokens import model_documents

PATTERN_TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2
"""Largest difference in an attention weight that rounding explains, in float32 and below it."""


def refit(
    model: Any,
    tokens: Tokens,
    mask: KeyMask,
    *,
    rounds: int = 2,
    iterations: int = 12,
    ridge: float = 1e-2,
    uniform: float = 0.2,
    stride: int = 2,
    progress: bool = True,
) -> RefitCut:
    """Fit the kept query and key dimensions to the intact attention logits, without training.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: calibration text, documents of one length; some 4,000 tokens or more. Its queries
            and keys are kept in memory: about 90 kB a token on a model of 135M weights.
        mask: what stays; no rotary pair may be split.
        rounds: how often queries and keys are solved in turn.
        iterations: conjugate-gradient steps of each solve.
        ridge: pull towards plain selection, relative to the mean curvature.
        uniform: share of the weights that is spread evenly over the keys, 0 to 1, so that keys
            which hardly get attention now are not free to get it after.
        stride: every how many positions a query is fitted; all keys are.
        progress: show a progress bar over layers.

    Returns:
        RefitCut: its ``facts`` hold the mean misfit of the attention (about nats of
        Kullback-Leibler divergence per query) before and after.

    Raises:
        InputError: a split pair, another shape, documents of unequal length, a setting below 1.
        UnsupportedModelError: attention that is more than causal with one scale (soft caps,
            windows, position biases), which the fit does not describe.
    """
    sites = key_sites(model)
    if mask.shape != sites.shape:
        raise InputError(f"mask has shape {mask.shape}: this model has {sites.shape}")
    if not mask.whole_pairs(sites.partner):
        raise InputError("mask splits a rotary pair: refit keeps or cuts whole pairs")
    if not 0 <= uniform < 1:
        raise InputError(f"uniform={uniform!r} is outside 0..1")
    for name, value in (("rounds", rounds), ("iterations", iterations), ("stride", stride)):
        if value < 1:
            raise InputError(f"{name}={value!r}: expected at least 1")
    documents = model_documents(model, tokens)
    if len({len(d) for d in documents}) > 1:
        raise InputError("tokens has documents of unequal length: refit takes one length")
    batch = torch.stack(documents)
    n_pos = batch.shape[1]
    check_intact(model, "refit")
    fingerprint = model_fingerprint(model)
    intact, turns = intact_attention(model, batch)
    at = torch.arange(min(stride, n_pos) - 1, n_pos, stride)
    d, group = sites.d_head, sites.group_size
    query_maps = torch.zeros(sites.n_layers, sites.n_heads, d, d)
    key_maps = torch.zeros(sites.n_layers, sites.n_kv_heads, d, d)
    misfits: list[tuple[float, float]] = []
    for layer in tqdm(range(sites.n_layers), desc="refit", unit="layer", disable=not progress):
        queries, keys = intact[layer]
        for head in range(sites.n_kv_heads):
            kept = mask.keep[layer, head].nonzero()[:, 0]
            if len(kept) == 0:
                continue
            rows = slice(head * group, (head + 1) * group)
            problem = _problem(
                queries[:, :, rows],
                keys[:, :, head],
                at,
                turns[layer],
                sites.logit_scale[layer],
                uniform,
            )
            m_q, m_k = fit_maps(problem, kept, rounds=rounds, iterations=iterations, ridge=ridge)
            eye = torch.eye(d)[kept]
            plain = misfit(problem, kept, eye.expand(group, -1, -1), eye)
            misfits.append((plain, misfit(problem, kept, m_q, m_k)))
            query_maps[layer][rows][:, kept] = m_q
            key_maps[layer, head][kept] = m_k
    before, after = (sum(m[i] for m in misfits) / max(1, len(misfits)) for i in (0, 1))
    facts = {
        "method": "least squares on attention logits",
        "fingerprint": fingerprint,
        "text": text_fingerprint(batch),
        "documents": list(document_identities([batch], getattr(model, "tokenizer", None))),
        "n_documents": len(batch),
        "n_tokens": batch.numel(),
        "rounds": rounds,
        "iterations": iterations,
        "ridge": ridge,
        "uniform": uniform,
        "stride": stride,
        "misfit_before": before,
        "misfit_after": after,
    }
    return RefitCut(mask, query_maps, key_maps, facts)


Pair = tuple[torch.Tensor, torch.Tensor]


def intact_attention(
    model: Any, batch: Int[torch.Tensor, "document pos"]
) -> tuple[list[Pair], list[Turn]]:
    """Rotated queries and keys of every layer, and the rotation that turned them.

    That the logit scale times q·k under a causal mask is all there is to a layer's attention is
    checked on the model's own attention pattern.

    Raises:
        UnsupportedModelError: it is not.
    """
    sites = key_sites(model)
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    marks: dict[int, torch.Tensor] = {}
    turns: dict[int, Turn] = {}
    following = sites.rotation.follow()

    def record(letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        found.setdefault((letter, layer), []).append(x.float().cpu())
        if layer not in turns:
            turns[layer] = following.turn(letter, layer, x.shape[1]).alone()

    def mark(values: torch.Tensor, hook: Any) -> torch.Tensor:
        seen = torch.eye(values.shape[1], values.shape[-1]).to(values)
        return seen[None, :, None, :].expand(values.shape).clone()

    def read(z: torch.Tensor, hook: Any, *, layer: int) -> None:
        marks[layer] = z.detach().float().cpu().reshape(*z.shape[:2], sites.n_heads, -1)

    recorders = query_key_hooks(sites, record, following=following)
    with attached(model, recorders):
        rows = max(1, TOKENS_PER_BATCH // batch.shape[1])
        for start in range(0, len(batch), rows):
            forward_layers(model, batch[start : start + rows])
    pairs = [
        (torch.cat(found["q", layer]), torch.cat(found["k", layer]))
        for layer in range(sites.n_layers)
    ]
    found.clear()
    # A prompt short enough for one-hot values: then hook_z spells the attention pattern out.
    spell: list[Hook] = list(recorders)
    for layer in range(sites.n_layers):
        spell.append((f"blocks.{layer}.attn.hook_v", mark))
        spell.append((f"blocks.{layer}.attn.hook_z", partial(read, layer=layer)))
    short = batch[:1, : min(batch.shape[1], sites.d_head)]
    with attached(model, spell):
        forward_layers(model, short)
    tolerance = PATTERN_TOLERANCE if is_exact(model) else HALF_TOLERANCE
    for layer in range(sites.n_layers):
        q, k = found["q", layer][0], found["k", layer][0].repeat_interleave(sites.group_size, 2)
        logits = sites.logit_scale[layer] * torch.einsum("bihd,bjhd->bhij", q, k)
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        wanted = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        given = marks[layer].permute(0, 2, 1, 3)[..., : wanted.shape[-1]]
        if float((wanted - given).abs().max()) > tolerance:
            raise UnsupportedModelError(
                f"{sites.architecture}: attention of layer {layer} is more than causal attention "
                "with one scale (soft cap, window or position bias), which refit does not describe"
            )
    return pairs, [turns[layer] for layer in range(sites.n_layers)]


def _problem(
    queries: Float[torch.Tensor, "document pos group d_head"],
    keys: Float[torch.Tensor, "document pos d_head"],
    at: Int[torch.Tensor, " query_pos"],
    turn: Turn,
    scale: float,
    uniform: float,
) -> Problem:
    q = queries.permute(2, 0, 1, 3)[:, :, at]
    causal = at[:, None] >= torch.arange(keys.shape[1])
    logits = scale * q @ keys.transpose(-1, -2)
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    weights = (1 - uniform) * weights + uniform * causal / causal.sum(-1, keepdim=True)
    q_turn = turn.at(at)
    return Problem(
        q_turn(q, inverse=True),
        turn(keys, inverse=True),
        logits.masked_fill(~causal, 0.0),
        weights,
        q_turn,
        turn,
        scale,
    )
