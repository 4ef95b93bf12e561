"""``RefitCut``: a cut whose kept query and key dimensions were refitted by least squares.

``refit(model, tokens, mask)`` is training-free: no gradient of the loss is taken, the maps are
least-squares fits of the attention logits (``gainlens.ablation.least_squares``). Layers are
fitted in order in one forward pass, each on the inputs that the already cut layers below it give,
and towards the logits that the intact model had there, so later layers make up for earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.least_squares import Problem, Turn, fit_maps, make_turn, misfit
from gainlens.ablation.mask import KeyMask
from gainlens.errors import FileFormatError, InputError, UnsupportedModelError
from gainlens.files import load_tensors, save_tensors
from gainlens.model.batches import Tokens, as_documents
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import TextHasher
from gainlens.model.hooks import Hook
from gainlens.model.sites import KeySites, key_sites
from gainlens.model.twin import Edit, Twin, build_twin


@dataclass(frozen=True, eq=False)
class RefitCut:
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

    def edit(self, sites: KeySites, n_pos: int) -> Edit:
        """The cut for ``gainlens.model.twin``: on rotated queries and keys of ``n_pos``."""
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
        """Raise ``InputError`` unless the maps have this model's shape."""
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
    rounds: int = 3,
    iterations: int = 12,
    ridge: float = 1e-3,
    progress: bool = True,
) -> RefitCut:
    """Fit the kept query and key dimensions to the intact attention logits, without training.

    Args:
        model: a TransformerBridge whose Hugging Face model can be rebuilt around its weights.
        tokens: calibration text, documents of one length; some 8,000 tokens or more. All of it
            is run as one batch.
        mask: what stays; no rotary pair may be split.
        rounds: how often queries and keys are solved in turn.
        iterations: conjugate-gradient steps of each solve.
        ridge: pull towards plain selection, relative to the mean curvature.
        progress: show a progress bar over layers.

    Returns:
        RefitCut: its ``facts`` hold the mean misfit of the attention (about nats of
        Kullback-Leibler divergence per query) before and after.

    Raises:
        InputError: a split pair, another shape, documents of unequal length.
        UnsupportedModelError: a HookedTransformer or a family without a twin; or logits that are
            soft-capped, which the fit does not describe.
    """
    sites = key_sites(model)
    if mask.shape != sites.shape:
        raise InputError(f"mask has shape {mask.shape}: this model has {sites.shape}")
    if not mask.whole_pairs(sites.partner):
        raise InputError("mask splits a rotary pair: refit keeps or cuts whole pairs")
    documents = as_documents(tokens, int(model.cfg.d_vocab))
    if len({len(d) for d in documents}) > 1:
        raise InputError("tokens has documents of unequal length: refit takes one length")
    batch = torch.stack(documents)
    twin = build_twin(model)
    if twin is None:
        raise UnsupportedModelError(
            f"{sites.architecture} as {type(model).__name__} can't be rebuilt around its weights, "
            "so its layers can't be refitted in order; load it with kind='bridge'"
        )
    intact = _intact(twin, batch, sites)
    if not twin.plain or twin.scaling is None:
        raise UnsupportedModelError(
            f"{sites.architecture} soft-caps its attention logits, windows or biases them; refit "
            "describes plain causal attention only"
        )
    scale = twin.scaling
    turns = layer_turns(sites, batch.shape[1])
    d, group = sites.d_head, sites.group_size
    query_maps = torch.zeros(sites.n_layers, sites.n_heads, d, d)
    key_maps = torch.zeros(sites.n_layers, sites.n_kv_heads, d, d)
    misfits: list[tuple[float, float]] = []
    bar = tqdm(total=sites.n_layers, desc="refit", unit="layer", disable=not progress)

    def fit(
        queries: torch.Tensor, keys: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turn = turns[layer]
        q = turn(queries.permute(2, 0, 1, 3).float(), inverse=True)
        k = turn(keys.permute(2, 0, 1, 3).float(), inverse=True)
        for head in range(sites.n_kv_heads):
            kept = mask.keep[layer, head].nonzero()[:, 0]
            if len(kept) == 0:
                continue
            rows = slice(head * group, (head + 1) * group)
            problem = _problem(intact[layer], q[rows], k[head], rows, head, turn, scale)
            m_q, m_k = fit_maps(problem, kept, rounds=rounds, iterations=iterations, ridge=ridge)
            eye = torch.eye(d)[kept]
            misfits.append(
                (
                    misfit(problem, kept, eye.expand(group, -1, -1), eye),
                    misfit(problem, kept, m_q, m_k),
                )
            )
            query_maps[layer][rows][:, kept] = m_q
            key_maps[layer, head][kept] = m_k
        intact[layer] = None
        bar.update()
        return (
            mapped(queries, query_maps[layer], turn),
            mapped(keys, key_maps[layer], turn),
        )

    with bar, torch.inference_mode(), twin.edited(fit):
        twin.hidden(batch)
    hasher = TextHasher()
    hasher.update(batch)
    before, after = (sum(m[i] for m in misfits) / max(1, len(misfits)) for i in (0, 1))
    facts = {
        "method": "least squares on attention logits",
        "fingerprint": model_fingerprint(model),
        "text": hasher.hexdigest(),
        "n_documents": len(batch),
        "n_tokens": batch.numel(),
        "rounds": rounds,
        "iterations": iterations,
        "ridge": ridge,
        "misfit_before": before,
        "misfit_after": after,
    }
    return RefitCut(mask, query_maps.clone(), key_maps.clone(), facts)


Pair = tuple[torch.Tensor, torch.Tensor]


def _intact(
    twin: Twin, batch: Int[torch.Tensor, "document pos"], sites: KeySites
) -> list[Pair | None]:
    """Rotated queries and keys of the intact model, per layer."""
    found: list[Pair | None] = [None] * sites.n_layers

    def keep(q: torch.Tensor, k: torch.Tensor, layer: int) -> Pair:
        found[layer] = (q.clone(), k.clone())
        return q, k

    with torch.inference_mode(), twin.edited(keep):
        for start in range(0, len(batch), 4):
            twin.hidden(batch[start : start + 4])
            if start == 0:
                parts: list[list[Pair]] = [[] for _ in range(sites.n_layers)]
            for layer, pair in enumerate(found):
                assert pair is not None
                parts[layer].append(pair)
    return [(torch.cat([q for q, _ in part]), torch.cat([k for _, k in part])) for part in parts]


def _problem(
    intact: Pair | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    rows: slice,
    head: int,
    turn: Turn,
    scale: float,
) -> Problem:
    assert intact is not None
    q = intact[0].permute(2, 0, 1, 3)[rows].float()
    k = intact[1].permute(2, 0, 1, 3)[head].float()
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    logits = scale * q @ k.transpose(-1, -2)
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    return Problem(queries, keys, logits.masked_fill(~causal, 0.0), weights, turn, scale)
