"""``KeySites``: where a TransformerLens model keeps its keys, and which dimensions form pairs."""

from __future__ import annotations

import math
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
    """The partner that each dimension rotates with; itself for a dimension that does not rotate.

    Args:
        d_head: width of a key head.
        rotary_dim: number of leading dimensions that rotate.
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
        rotary_dim: number of dimensions of a head that rotate (0 without rotary embeddings).
        rotation: the rotation of queries and keys: angles, scale, positions.
        logit_scale: factor on the query-key product of each layer, measured on the model's
            attention pattern.
        rotated_fires: whether ``hook_rot_k`` fires.
        norm_after_projection: whether there is a norm between ``hook_k`` and the attention, so
            that a cut at ``hook_k`` would change the kept dimensions.
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

    def __repr__(self) -> str:
        rotary = "no rotary embeddings"
        if self.rotary_dim:
            turning = self.frequencies[self.frequencies > 0]
            ends = (turning.max(), turning.min()) if len(turning) else ()
            waves = " to ".join(f"{math.tau / float(f):,.0f}" for f in ends) or "unknown"
            rotary = f"{self.rotary_dim // 2} rotary pairs ({self.pairing}), {waves} tokens a turn"
        hooks = ", ".join(self.key_hook(0, stage) for stage in self.stages)
        return (
            f"KeySites({self.architecture}, {self.n_layers} layers × {self.n_kv_heads} key heads × "
            f"{self.d_head} dims, {self.n_heads} query heads; {rotary}; keys at {hooks} …)"
        )

    @property
    def frequencies(self) -> Float[torch.Tensor, "layer rotary_pair"]:
        """Radians per token of each pair, measured on short text, ``[layer, rotary_dim / 2]``.

        Zero in a layer that does not rotate.
        """
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
        """The partner that each dimension rotates with (itself if it does not rotate)."""
        return pair_partners(self.d_head, self.rotary_dim, self.pairing)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages at which the model fires key hooks."""
        return ("projected", "rotated") if self.rotated_fires else ("projected",)

    def hook_stage(self, stage: Stage) -> Stage:
        """The stage to hook: ``projected`` if the rotated hooks never fire."""
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
                "(whole rotary pairs have the same energy at both stages)"
            )
        rot = "rot_" if stage == "rotated" else ""
        return f"blocks.{layer}.attn.hook_{rot}{letter}"

    def check_projected_cut(self) -> None:
        """Refuse a cut before a norm.

        Raises:
            UnsupportedModelError: the model normalises its keys after ``hook_k``.
        """
        if self.norm_after_projection:
            raise UnsupportedModelError(
                f"{self.architecture} normalises its keys after hook_k, so a cut there changes the "
                "kept dimensions; cut at stage='rotated'"
            )
