"""``RefitCut``: a cut whose kept query and key dimensions were refitted by least squares.

``refit(model, tokens, mask)`` is training-free: no gradient of the loss is taken, the maps are
least-squares fits of the attention logits (``gainlens.ablation.least_squares``), of every head by
itself, on the queries and keys of the intact model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.kept import Kept
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.least_squares import Problem, Turn, fit_maps, make_turn, misfit
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import TextHasher
from gainlens.data.overlap import document_identities
from gainlens.errors import FileFormatError, InputError, UnsupportedModelError
from gainlens.files import load_tensors, save_tensors
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached
from gainlens.model.rotation import rotate
from gainlens.model.sites import KeySites
from gainlens.model.tokens import model_documents

PATTERN_TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2
"""Largest difference in an attention weight that rounding explains, in float32 and below it."""


@dataclass(frozen=True, eq=False)
class RefitCut(Kept):
    """A mask and the linear maps that the kept dimensions carry instead of their own values.

    Before the rotation, query head h reads ``query_maps[layer, h] @ q`` and key head g
    ``key_maps[layer, g] @ k``; rows of cut dimensions are zero, so both fold into W_Q and W_K.

    Attributes:
        mask: what stays.
        query_maps: dimensionless, per query head.
        key_maps: dimensionless, per key head.
        facts: how it was made, with the misfit before and after; see ``refit``.
    """

    mask: KeyMask
    query_maps: Float[torch.Tensor, "layer head d_head d_head2"]
    key_maps: Float[torch.Tensor, "layer kv_head d_head d_head2"]
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RefitCut({self.mask!r})"

    @property
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """What stays, as in ``mask``."""
        return self.mask.keep

    def edit(self, sites: KeySites, n_pos: int) -> Edit:
        """The cut for ``gainlens.model.fast_copy``: on rotated queries and keys of ``n_pos``.

        ``sites`` are those of the model to be cut; errors as for ``check``.
        """
        self.check(sites)
        turns = layer_turns(sites, n_pos)

        def cut(
            queries: torch.Tensor, keys: torch.Tensor, layer: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            turn = turns[layer]
            return (
                mapped(queries, self.query_maps[layer], turn),
                mapped(keys, self.key_maps[layer], turn),
            )

        return cut

    def hooks(self, model: Any) -> list[Hook]:
        """The cut as forward hooks, for ``run_with_hooks``.

        Raises:
            InputError: maps of another model's shape.
        """
        sites = key_sites(model)
        self.check(sites)
        stage = sites.hook_stage("rotated")

        def at(tensor: torch.Tensor, hook: Any, *, maps: torch.Tensor, layer: int) -> torch.Tensor:
            turn = None
            if stage == "rotated":
                turn = make_turn(tensor.shape[1], sites.frequencies[layer], sites.partner)
            return mapped(tensor, maps, turn)

        found: list[Hook] = []
        for layer in range(sites.n_layers):
            q, k = sites.query_hook(layer, stage), sites.key_hook(layer, stage)
            found.append((q, partial(at, maps=self.query_maps[layer], layer=layer)))
            found.append((k, partial(at, maps=self.key_maps[layer], layer=layer)))
        return found

    def check(self, sites: KeySites) -> None:
        """Raise ``InputError`` unless the maps have the shape of the model with these ``sites``."""
        expected = (sites.n_layers, sites.n_heads, sites.d_head, sites.d_head)
        if self.mask.shape != sites.shape or tuple(self.query_maps.shape) != expected:
            raise InputError(
                f"cut has maps {tuple(self.query_maps.shape)} and mask {self.mask.shape}: this "
                f"model ({sites.architecture}) has {expected} and {sites.shape}"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            "keep": self.mask.keep,
            "query_maps": self.query_maps,
            "key_maps": self.key_maps,
        }
        save_tensors(path, "refit", tensors, {"mask": self.mask.facts, "refit": self.facts})

    @classmethod
    def load(cls, path: str | Path) -> RefitCut:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: missing, truncated, or not a refitted cut.
        """
        tensors, facts = load_tensors(path, "refit")
        try:
            mask = KeyMask(tensors["keep"], facts["mask"])
            cut = cls(mask, tensors["query_maps"], tensors["key_maps"], facts["refit"])
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks or mislabels a field: {error}") from None
        if not all(bool(torch.isfinite(m).all()) for m in (cut.query_maps, cut.key_maps)):
            raise FileFormatError(f"{path}: its maps hold NaN or infinity")
        return cut


def layer_turns(sites: KeySites, n_pos: int) -> list[Turn]:
    """The rotation of each layer at positions 0 … ``n_pos`` - 1."""
    return [make_turn(n_pos, f, sites.partner) for f in sites.frequencies]


def mapped(
    x: Float[torch.Tensor, "batch pos head d_head"],
    maps: Float[torch.Tensor, "head d_head d_head2"],
    turn: Turn | None,
) -> Float[torch.Tensor, "batch pos head d_head"]:
    """Apply one map per head, in the frame before the rotation when ``turn`` is given."""
    by_head = x.transpose(1, 2).float()
    if turn is not None:
        by_head = turn(by_head, inverse=True)
    new = torch.einsum("bhpi,hri->bhpr", by_head, maps.to(by_head))
    if turn is not None:
        new = turn(new)
    return new.transpose(1, 2).to(x.dtype)


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
    intact, scale = intact_attention(model, batch)
    turns = layer_turns(sites, n_pos)
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
                queries[:, :, rows], keys[:, :, head], at, turns[layer], scale, uniform
            )
            m_q, m_k = fit_maps(problem, kept, rounds=rounds, iterations=iterations, ridge=ridge)
            eye = torch.eye(d)[kept]
            plain = misfit(problem, kept, eye.expand(group, -1, -1), eye)
            misfits.append((plain, misfit(problem, kept, m_q, m_k)))
            query_maps[layer][rows][:, kept] = m_q
            key_maps[layer, head][kept] = m_k
    hasher = TextHasher()
    hasher.update(batch)
    before, after = (sum(m[i] for m in misfits) / max(1, len(misfits)) for i in (0, 1))
    facts = {
        "method": "least squares on attention logits",
        "fingerprint": model_fingerprint(model),
        "text": hasher.hexdigest(),
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
) -> tuple[list[Pair], float]:
    """Rotated queries and keys of every layer, and the scale of the logits that they make.

    That scale · q·k under a causal mask is all there is to a layer's attention is checked on the
    model's own attention pattern.

    Raises:
        UnsupportedModelError: it is not.
    """
    sites = key_sites(model)
    stage = sites.hook_stage("rotated")
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    marks: dict[int, torch.Tensor] = {}

    def record(x: torch.Tensor, hook: Any, *, what: str, layer: int) -> None:
        if stage == "projected":
            x = rotate(x, sites.frequencies[layer], sites.pairing)
        found.setdefault((what, layer), []).append(x.detach().float().cpu())

    def mark(values: torch.Tensor, hook: Any) -> torch.Tensor:
        seen = torch.eye(values.shape[1], values.shape[-1]).to(values)
        return seen[None, :, None, :].expand(values.shape).clone()

    def read(z: torch.Tensor, hook: Any, *, layer: int) -> None:
        marks[layer] = z.detach().float().cpu().reshape(*z.shape[:2], sites.n_heads, -1)

    recorders: list[Hook] = []
    for layer in range(sites.n_layers):
        for what, name in (("q", sites.query_hook), ("k", sites.key_hook)):
            recorders.append((name(layer, stage), partial(record, what=what, layer=layer)))
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
    scale = _logit_scale(model, sites)
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = PATTERN_TOLERANCE if exact else HALF_TOLERANCE
    for layer in range(sites.n_layers):
        q, k = found["q", layer][0], found["k", layer][0].repeat_interleave(sites.group_size, 2)
        logits = scale * torch.einsum("bihd,bjhd->bhij", q, k)
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        wanted = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        given = marks[layer].permute(0, 2, 1, 3)[..., : wanted.shape[-1]]
        if float((wanted - given).abs().max()) > tolerance:
            raise UnsupportedModelError(
                f"{sites.architecture}: attention of layer {layer} is more than causal attention "
                "with one scale (soft cap, window or position bias), which refit does not describe"
            )
    return pairs, scale


def _logit_scale(model: Any, sites: KeySites) -> float:
    config = getattr(getattr(model, "original_model", None), "config", None)
    known = getattr(config, "query_pre_attn_scalar", None)
    if known:
        return 1.0 / math.sqrt(known)
    direct = getattr(config, "attention_multiplier", None)
    if direct:
        return float(direct)
    return 1.0 / math.sqrt(sites.d_head)


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
