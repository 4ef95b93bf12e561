"""One layer's attention weights in a common form for all families, and reduced versions of them.

``gainlens.model.attention_layouts`` describes where each architecture keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float


@runtime_checkable
class Slots(Protocol):
    """The source dimension of each dimension (slot) of a thin head."""

    @property
    def width(self) -> int:
        """Number of dimensions of a thin head."""

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """``[kv_head, width]``: the dimension in each slot; -1 for an empty slot."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One layer's attention weights, separated by head.

    Attributes:
        q, k, v: ``[head, d_head, d_model]``, keys and values with ``n_kv_heads``.
        o: ``[d_model, head, d_value]``.
        q_bias, k_bias, v_bias: ``[head, d_head]`` or None.
        o_bias: ``[d_model]`` or None.
        q_norm, k_norm: weights of the norm before the rotation, ``[kv_head, kept]`` (including
            the family's offset), or None; ``[head, kept]`` for queries whose heads differ.
        q_norm_bias, k_norm_bias: what the norm adds at last, or None.
        q_map, k_map: maps of queries and keys after the norm into the slots of a thin head,
            ``[head, slot, d_head]``, or None.
    """

    q: Float[torch.Tensor, "head d_head d_model"]
    k: Float[torch.Tensor, "kv_head d_head d_model"]
    v: Float[torch.Tensor, "kv_head d_value d_model"]
    o: Float[torch.Tensor, "d_model head d_value"]
    q_bias: Float[torch.Tensor, "head d_head"] | None = None
    k_bias: Float[torch.Tensor, "kv_head d_head"] | None = None
    v_bias: Float[torch.Tensor, "kv_head d_value"] | None = None
    o_bias: Float[torch.Tensor, " d_model"] | None = None
    q_norm: Float[torch.Tensor, "norm_head kept"] | None = None
    k_norm: Float[torch.Tensor, "kv_head kept"] | None = None
    q_norm_bias: Float[torch.Tensor, "norm_head kept"] | None = None
    k_norm_bias: Float[torch.Tensor, "kv_head kept"] | None = None
    q_map: Float[torch.Tensor, "head slot d_head"] | None = None
    k_map: Float[torch.Tensor, "kv_head slot d_head"] | None = None

    def thin_keys(self, layout: Slots) -> AttentionWeights:
        """Queries and keys reduced to the layout's slots; empty slots are zero rows.

        With a norm, the projections keep their full width, since the norm's statistic is taken
        over it. Their rows are reordered so that the kept slots come first.
        """
        group = self.q.shape[0] // self.k.shape[0]
        order = layout.order
        if self.k_norm is not None and self.q_norm is not None:
            whole = whole_order(order, self.k.shape[1])
            each = np.repeat(order, len(self.q_norm) // len(self.k_norm), 0)
            return replace(
                self,
                q=take_rows(self.q, np.repeat(whole, group, 0)),
                k=take_rows(self.k, whole),
                q_bias=_take(self.q_bias, np.repeat(whole, group, 0)),
                k_bias=_take(self.k_bias, whole),
                q_norm=take_rows(self.q_norm, each),
                k_norm=take_rows(self.k_norm, order),
                q_norm_bias=_take(self.q_norm_bias, each),
                k_norm_bias=_take(self.k_norm_bias, order),
            )
        return replace(
            self,
            q=take_rows(self.q, np.repeat(order, group, 0)),
            k=take_rows(self.k, order),
            q_bias=_take(self.q_bias, np.repeat(order, group, 0)),
            k_bias=_take(self.k_bias, order),
        )

    def mapped(
        self,
        queries: Float[torch.Tensor, "head d_head d_head"],
        keys: Float[torch.Tensor, "kv_head d_head d_head"],
    ) -> AttentionWeights:
        """Projections composed with one linear map per head, computed in float64."""

        def after(maps: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor | None:
            if w is None:
                return None
            return torch.einsum("hrd,hd...->hr...", maps.to(w.device).double(), w.double()).to(
                w.dtype
            )

        q, k = after(queries, self.q), after(keys, self.k)
        assert q is not None
        assert k is not None
        return replace(
            self, q=q, k=k, q_bias=after(queries, self.q_bias), k_bias=after(keys, self.k_bias)
        )

    def with_maps(
        self,
        queries: Float[torch.Tensor, "head d_head d_head2"],
        keys: Float[torch.Tensor, "kv_head d_head d_head2"],
        layout: Slots,
    ) -> AttentionWeights:
        """Whole projections and norms, with maps of their outputs into the layout's slots."""
        group = self.q.shape[0] // self.k.shape[0]
        dtype, device = self.q.dtype, self.q.device
        by_query = np.repeat(layout.order, group, 0)
        return replace(
            self,
            q_map=take_rows(queries.to(device), by_query).to(dtype),
            k_map=take_rows(keys.to(device), layout.order).to(dtype),
        )

    def thin_values(
        self,
        down: Float[torch.Tensor, "kv_head width d_value"],
        up: Float[torch.Tensor, "kv_head d_value width"],
    ) -> AttentionWeights:
        """Value projection composed with ``down``, output with ``up``, computed in float64."""
        group = self.q.shape[0] // self.k.shape[0]
        wide = up.repeat_interleave(group, 0)
        v = torch.einsum("krd,kdm->krm", down, self.v.double())
        o = torch.einsum("mhd,hdr->mhr", self.o.double(), wide)
        bias = self.v_bias
        if bias is not None:
            bias = torch.einsum("krd,kd->kr", down, bias.double()).to(bias.dtype)
        return replace(self, v=v.to(self.v.dtype), o=o.to(self.o.dtype), v_bias=bias)

    def projections(self) -> dict[str, Float[torch.Tensor, "..."]]:
        """Contiguous tensors, named like the parameters of a slim attention module."""
        found = {
            "q_proj.weight": self.q.flatten(0, 1),
            "k_proj.weight": self.k.flatten(0, 1),
            "v_proj.weight": self.v.flatten(0, 1),
            "o_proj.weight": self.o.flatten(1),
        }
        for name, bias in (("q", self.q_bias), ("k", self.k_bias), ("v", self.v_bias)):
            if bias is not None:
                found[f"{name}_proj.bias"] = bias.flatten()
        if self.o_bias is not None:
            found["o_proj.bias"] = self.o_bias
        if self.q_norm is not None and self.k_norm is not None:
            found["q_norm"], found["k_norm"] = self.q_norm, self.k_norm
        if self.q_norm_bias is not None and self.k_norm_bias is not None:
            found["q_norm_bias"], found["k_norm_bias"] = self.q_norm_bias, self.k_norm_bias
        if self.q_map is not None and self.k_map is not None:
            found["q_map"], found["k_map"] = self.q_map, self.k_map
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def take_rows(
    weight: Float[torch.Tensor, "head row *rest"], order: npt.NDArray[np.int64]
) -> Float[torch.Tensor, "head slot *rest"]:
    """Rows of each head in the given order; a zero row for -1."""
    index = torch.from_numpy(order).to(weight.device)
    head = torch.arange(len(weight), device=weight.device)[:, None]
    rows = weight[head, index.clamp_min(0)]
    empty = (index < 0).reshape(*index.shape, *(1,) * (weight.ndim - 2))
    return rows.masked_fill_(empty, 0) if bool(empty.any()) else rows


def whole_order(order: npt.NDArray[np.int64], d_head: int) -> npt.NDArray[np.int64]:
    """Every dimension once: kept ones in their slots, cut ones in empty slots and at the end."""
    rows = np.empty((len(order), d_head), dtype=np.int64)
    for head, slots in enumerate(order):
        cut = iter(sorted(set(range(d_head)) - set(slots[slots >= 0].tolist())))
        rows[head, : len(slots)] = [s if s >= 0 else next(cut) for s in slots]
        rows[head, len(slots) :] = list(cut)
    return rows


def _take(
    bias: Float[torch.Tensor, "head row"] | None, order: npt.NDArray[np.int64]
) -> Float[torch.Tensor, "head slot"] | None:
    return None if bias is None else take_rows(bias, order)
