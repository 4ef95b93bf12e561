"""The value path: the best low-rank value head for the measured attention outputs.

An invertible map and its inverse between W_V and W_O of a key head change nothing. With z the
attention-weighted mean of values and C = E[z zᵀ] measured on calibration text, the rank-r pair
(down, up) that minimises the mean squared error of the output, summed over the query heads of
the group, comes from the eigenvectors of C½ (Σ W_Oᵀ W_O) C½.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

from gainlens.export.sources.base import Flows, Source
from gainlens.model.attention_weights import AttentionWeights

RIDGE = 1e-6
"""Added to C, as a share of its mean diagonal, so that directions never seen stay finite."""


@dataclass(frozen=True, eq=False)
class ValuePath:
    """Maps of one layer: ``down`` for the values, ``up`` for the output projection.

    Attributes:
        down: ``[kv_head, width, d_value]``, float64.
        up: ``[kv_head, d_value, width]``, float64.
        lost: lost share of the mean square of the output, per key head.
    """

    down: Float[torch.Tensor, "kv_head width d_value"]
    up: Float[torch.Tensor, "kv_head d_value width"]
    lost: Float[torch.Tensor, " kv_head"]

    @property
    def projection(self) -> Float[torch.Tensor, "kv_head d_value d_value"]:
        """Matrix that multiplies an attention output from the right."""
        return (self.up @ self.down).transpose(1, 2)

    @property
    def orthonormal(self) -> ValuePath:
        """The same path with rows of ``down`` of length 1 and at right angles."""
        q, r = torch.linalg.qr(self.down.transpose(1, 2))
        return replace(self, down=q.transpose(1, 2), up=self.up @ r.transpose(1, 2))


def value_path(
    weights: AttentionWeights, flow: Float[torch.Tensor, "kv_head d_value d_value"], width: int
) -> ValuePath:
    """The best maps of one layer for value heads of ``width``.

    Args:
        weights: the layer's full attention.
        flow: E[z zᵀ] per key head, float64.
        width: dimensions that a value head keeps.
    """
    n_kv, d = len(weights.v), weights.v.shape[1]
    o = weights.o.double().cpu()
    grouped = o.reshape(len(o), n_kv, -1, d).permute(1, 0, 2, 3).flatten(1, 2)
    gram = grouped.transpose(1, 2) @ grouped
    scale = torch.diagonal(flow, dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    seen = flow + RIDGE * scale * torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(seen)
    root = vectors * values.sqrt()[:, None] @ vectors.transpose(1, 2)
    inverse = vectors / values.sqrt()[:, None] @ vectors.transpose(1, 2)
    strength, directions = torch.linalg.eigh(root @ gram @ root)
    best = directions.flip(-1)[..., :width]
    kept = strength.flip(-1)[..., :width].sum(-1)
    # Down makes numbers of mean square 1; a common factor keeps values at their old size.
    size = torch.diagonal(flow, dim1=1, dim2=2).mean(1).sqrt()[:, None, None].clamp_min(1e-30)
    return ValuePath(
        down=best.transpose(1, 2) @ inverse * size,
        up=root @ best / size,
        lost=1 - kept / strength.sum(-1).clamp_min(1e-300),
    )


def value_paths(source: Source, widths: tuple[int, ...], flows: Flows) -> list[ValuePath | None]:
    """One path per layer; None where the layer keeps its full width."""
    d_head = source.shape[2]
    return [
        None if width == d_head else value_path(source.attention(layer), flows[layer], width)
        for layer, width in enumerate(widths)
    ]
