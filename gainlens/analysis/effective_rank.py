"""Effective rank of queries and keys: how many directions carry the variance of a head.

If the keys of a head span four directions of 64, the head could lose dimensions in its own basis
even if no single dimension is quiet. The rotation spreads the variance of a pair over positions, so
the rank is reported before and after it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.data.batches import TOKENS_PER_BATCH, Tokens, batches
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached
from gainlens.model.recorder import query_key_hooks
from gainlens.model.sites import KeySites, Stage


@dataclass(frozen=True, eq=False)
class EffectiveRank:
    """Two effective ranks of the covariance of every head, by side and stage.

    Attributes:
        participation: (Σλ)² / Σλ² over the eigenvalues λ, ``[layer, head]``, keyed by
            ``(side, stage)``; the side is ``query`` or ``key``. 1 to d_head; 0 for a constant
            head.
        entropy: exp of the entropy of λ / Σλ (Roy and Vetterli, 2007), keyed the same way.
        d_head: dimensions of a head.
        n_tokens, n_documents: size of the text.
    """

    participation: dict[tuple[str, Stage], Float[np.ndarray, "layer head"]]
    entropy: dict[tuple[str, Stage], Float[np.ndarray, "layer head"]]
    d_head: int
    n_tokens: int
    n_documents: int

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{side}s {stage} {rank.mean():.1f}" for (side, stage), rank in self.entropy.items()
        )
        return f"EffectiveRank({shown}; of {self.d_head} dimensions, mean over heads)"

    def table(self) -> list[dict[str, Any]]:
        """One row per side, stage, layer and head."""
        return [
            {
                "side": side,
                "stage": stage,
                "layer": layer,
                "head": head,
                "participation": float(self.participation[side, stage][layer, head]),
                "entropy": float(entropy[layer, head]),
                "d_head": self.d_head,
            }
            for (side, stage), entropy in self.entropy.items()
            for layer, head in np.ndindex(*entropy.shape)
        ]

    def summary(self) -> list[dict[str, Any]]:
        """One row per side and stage: mean over heads, and the lowest and highest head."""
        return [
            {
                "side": side,
                "stage": stage,
                "participation": float(self.participation[side, stage].mean()),
                "entropy": float(entropy.mean()),
                "entropy_lowest": float(entropy.min()),
                "entropy_highest": float(entropy.max()),
                "d_head": self.d_head,
            }
            for (side, stage), entropy in self.entropy.items()
        ]


def effective_rank(
    model: Any,
    tokens: Tokens,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> EffectiveRank:
    """Effective rank of queries and keys before and after the rotation, in one streaming pass.

    The covariance is over all tokens, with the mean subtracted: a key that is the same at every
    position has no effect on attention. Memory does not grow with the text.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: as for ``probe_gains``.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        InputError: fewer than two tokens.
        SilentSiteError: the hook of a layer did not fire.

    Example:
        >>> effective_rank(model, tokens).summary()
    """
    sites = key_sites(model)
    sums = _Sums(sites)
    n_documents = 0
    with ExitStack() as stack, tqdm(desc="rank", unit="doc", disable=not progress) as bar:
        stack.enter_context(attached(model, sums.hooks()))
        for batch in batches(tokens, int(model.cfg.d_vocab), tokens_per_batch):
            forward_layers(model, batch)
            n_documents += len(batch)
            bar.update(len(batch))
    return sums.ranks(n_documents)


class _Sums:
    """First and second moments of every head, float64."""

    def __init__(self, sites: KeySites) -> None:
        self.sites = sites
        stages: tuple[Stage, ...] = ("projected", "rotated") if sites.rotary_dim else ("projected",)
        self.keys = [(side, stage) for side in ("query", "key") for stage in stages]
        d = sites.d_head
        self.first, self.second = {}, {}
        for side, stage in self.keys:
            heads = sites.n_heads if side == "query" else sites.n_kv_heads
            shape = (sites.n_layers, heads, d)
            self.first[side, stage] = torch.zeros(shape, dtype=torch.float64)
            self.second[side, stage] = torch.zeros((*shape, d), dtype=torch.float64)
        self.count = {key: [0] * sites.n_layers for key in self.keys}

    def hooks(self) -> list[Hook]:
        return query_key_hooks(self.sites, self._add, stages=tuple({s: 0 for _, s in self.keys}))

    def _add(self, letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        side = "query" if letter == "q" else "key"
        rows = x.detach().flatten(0, 1).double()
        self.count[side, stage][layer] += len(rows)
        self.first[side, stage][layer] += rows.sum(0).cpu()
        self.second[side, stage][layer] += torch.einsum("nhd,nhe->hde", rows, rows).cpu()

    def ranks(self, n_documents: int) -> EffectiveRank:
        counts = {n for per_layer in self.count.values() for n in per_layer}
        if len(counts) != 1 or 0 in counts:
            raise SilentSiteError(
                "some query or key hooks did not fire, so the rank cannot be computed"
            )
        n = counts.pop()
        if n < 2:
            raise InputError(f"tokens has {n} token: expected two or more")
        participation, entropy = {}, {}
        for key in self.keys:
            mean = self.first[key] / n
            covariance = self.second[key] / n - mean[..., :, None] * mean[..., None, :]
            share = torch.linalg.eigvalsh(covariance).clamp_min(0)
            total = share.sum(-1, keepdim=True)
            alive = total[..., 0] > 1e-12 * self.second[key].diagonal(dim1=-2, dim2=-1).sum(-1) / n
            share = torch.where(total > 0, share / total.clamp_min(1e-300), 0.0)
            flat = torch.where(alive, 1 / share.square().sum(-1).clamp_min(1e-300), 0.0)
            spread = torch.where(alive, torch.special.entr(share).sum(-1).exp(), 0.0)
            participation[key], entropy[key] = flat.numpy(), spread.numpy()
        return EffectiveRank(participation, entropy, self.sites.d_head, n, n_documents)
