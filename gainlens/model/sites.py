"""``KeySites``: where a TransformerLens model keeps its keys, and which dimensions pair up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.families import Pairing
from gainlens.model.rotation import Rotation

Stage = Literal["projected", "rotated"]
STAGES: tuple[Stage, ...] = ("projected", "rotated")


def pair_partners(d_head: int, rotary_dim: int, pairing: Pairing) -> Int[torch.Tensor, " d_head"]:
    """For each dimension the one that it rotates with; a dimension that does not is its own.

    Args:
        d_head: width of a key head.
        rotary_dim: how many leading dimensions rotate.
        pairing: ``half``, ``adjacent`` or ``none``.
    """
    partner = torch.arange(d_head)
    if pairing == "half":
        half = rotary_dim // 2
        partner[:half] = torch.arange(half, 2 * half)
        partner[half : 2 * half] = torch.arange(half)
    elif pairing == "adjacent":
        partner[: rotary_dim // 2 * 2] ^= 1
    return partner


@dataclass(frozen=True, eq=False)
class KeySites:
    """The keys of one model: hook names, layout, grouping, rotary pairs.

    Every tensor at these hooks has the layout ``[batch, pos, head, d_head]`` with ``n_kv_heads``
    heads for keys and ``n_heads`` for queries. Query head h reads key head ``h // group_size``.

    Attributes:
        architecture: the Hugging Face architecture name, or ``"unknown"``.
        n_layers, n_heads, n_kv_heads, d_head: sizes; dimensionless counts.
        pairing: how rotary dimensions are paired.
        rotary_dim: how many dimensions of a head rotate (0 without rotary embeddings).
        rotation: what turns queries and keys: angles, size, positions.
        logit_scale: what a query-key product is multiplied by, per layer, as the model's own
            attention pattern shows it.
        rotated_fires: whether ``hook_rot_k`` fires.
        norm_after_projection: whether a norm sits between ``hook_k`` and the attention, so that
            a cut at ``hook_k`` would move the dimensions that stay.
    """

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    pairing: Pairing
    rotary_dim: int
    rotation: Rotation
    logit_scale: tuple[float, ...]
    rotated_fires: bool
    norm_after_projection: bool

    @property
    def frequencies(self) -> Float[torch.Tensor, "layer rotary_pair"]:
        """Radians per token of each pair's rotation, measured on the model on short text,
        ``[layer, rotary_dim / 2]``; zero in a layer that does not rotate."""
        return self.rotation.frequencies

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``: the shape of gains and masks."""
        return self.n_layers, self.n_kv_heads, self.d_head

    @property
    def partner(self) -> Int[torch.Tensor, " d_head"]:
        """For each dimension the one it rotates with (itself where it does not rotate)."""
        return pair_partners(self.d_head, self.rotary_dim, self.pairing)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages at which the model fires a key hook."""
        return ("projected", "rotated") if self.rotated_fires else ("projected",)

    def hook_stage(self, stage: Stage) -> Stage:
        """The stage whose hooks to use: ``projected`` where the rotated ones are silent."""
        return "rotated" if stage == "rotated" and self.rotated_fires else "projected"

    def key_hook(self, layer: int, stage: Stage) -> str:
        """The hook name of a layer's keys at a stage."""
        return self._hook(layer, "k", stage)

    def query_hook(self, layer: int, stage: Stage) -> str:
        """The hook name of a layer's queries at a stage."""
        return self._hook(layer, "q", stage)

    def _hook(self, layer: int, letter: str, stage: Stage) -> str:
        if stage not in STAGES:
            raise InputError(f"stage={stage!r} is not one of {', '.join(STAGES)}")
        if stage == "rotated" and not self.rotated_fires:
            raise UnsupportedModelError(
                f"{self.architecture} never fires hook_rot_{letter}; use stage='projected' "
                "(for whole rotary pairs both stages carry the same energy)"
            )
        rot = "rot_" if stage == "rotated" else ""
        return f"blocks.{layer}.attn.hook_{rot}{letter}"

    def check_projected_cut(self) -> None:
        """Refuse a cut before a norm.

        Raises:
            UnsupportedModelError: a norm over the key sits after ``hook_k``.
        """
        if self.norm_after_projection:
            raise UnsupportedModelError(
                f"{self.architecture} normalises its keys after hook_k, so a cut there moves the "
                "dimensions that stay; cut at stage='rotated'"
            )
