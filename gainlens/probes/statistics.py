"""Streaming statistics: sums filled by hooks, one row each in ``STATISTICS``.

A statistic is a set of named float64 sums of shape ``[layer, kv_head, d_head]`` and the hooks
that add a batch to them. Sums are additive over texts, so gains can be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float

from gainlens.model.hooks import Hook
from gainlens.model.recorder import Letter, query_key_hooks
from gainlens.model.sites import KeySites, Stage
from gainlens.probes.backward import fisher_hooks
from gainlens.probes.spread import spread_hooks

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    Attributes:
        name: the name that scores use to request it.
        arrays: a function from the sites to the names of the sums that it fills.
        hooks: a function from the sites and the sums to the hooks that add one batch.
        backward: whether a backward pass of the loss is needed.
    """

    name: str
    arrays: Callable[[KeySites], tuple[str, ...]]
    hooks: Callable[[KeySites, Sums], list[Hook]]
    backward: bool = False


def _accumulate(
    sums: Sums, name: str, layer: int, value: Float[torch.Tensor, "kv_head d_head"]
) -> None:
    target = sums[name]
    target[layer] += value.to(target)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    # Apple GPUs have no float64: each batch is summed in float32, then added in float64 on the CPU.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def key_moments(sums: Sums, stage: Stage, layer: int, keys: torch.Tensor) -> None:
    """Add Σk and Σk² over batch and position."""
    wide = _wide(keys)
    _accumulate(sums, f"k_sum.{stage}", layer, keys.sum((0, 1), dtype=wide))
    norm = torch.linalg.vector_norm(keys, dim=(0, 1), dtype=wide)
    _accumulate(sums, f"k_sq.{stage}", layer, norm.square())


def query_energy(sums: Sums, stage: Stage, layer: int, queries: torch.Tensor) -> None:
    """Add Σq² over batch, position and the query heads of each key head."""
    norm = torch.linalg.vector_norm(queries, dim=(0, 1), dtype=_wide(queries))
    n_kv_heads = sums[f"q_sq.{stage}"].shape[1]
    group = norm.square().reshape(n_kv_heads, -1, norm.shape[-1]).sum(1)
    _accumulate(sums, f"q_sq.{stage}", layer, group)


Update = Callable[[Sums, Stage, int, torch.Tensor], None]


def _stage_hooks(letter: Letter, update: Update, sites: KeySites, sums: Sums) -> list[Hook]:
    """Hooks that call ``update`` at both stages; a stage without hooks is computed here."""

    def receive(what: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        update(sums, stage, layer, x)

    return query_key_hooks(sites, receive, stages=filled_stages(sites), letters=(letter,))


def filled_stages(sites: KeySites) -> tuple[Stage, ...]:
    """Stages at which sums are kept; without a rotation, both stages are the same."""
    return ("projected", "rotated") if sites.rotated_fires or sites.rotary_dim else ("projected",)


def _per_stage(*names: str) -> Callable[[KeySites], tuple[str, ...]]:
    return lambda sites: tuple(f"{n}.{stage}" for n in names for stage in filled_stages(sites))


def _last_stage(*names: str) -> Callable[[KeySites], tuple[str, ...]]:
    return lambda sites: tuple(f"{n}.{filled_stages(sites)[-1]}" for n in names)


STATISTICS: dict[str, Statistic] = {
    s.name: s
    for s in (
        Statistic("keys", _per_stage("k_sum", "k_sq"), partial(_stage_hooks, "k", key_moments)),
        Statistic("queries", _per_stage("q_sq"), partial(_stage_hooks, "q", query_energy)),
        Statistic("logit_spread", _last_stage("logit_sq", "logit_cross"), spread_hooks),
        Statistic(
            "fisher",
            _per_stage("fisher_sq", "fisher_cross", "fisher_documents"),
            fisher_hooks,
            backward=True,
        ),
    )
}
