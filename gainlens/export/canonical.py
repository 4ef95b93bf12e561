"""The canonical basis of a head without rotation: singular directions of its query-key product.

A head's logits depend on W_Q and W_K only through (W_Q x + b_q)ᵀ(W_K y + b_k). Its singular value
decomposition, including biases, gives queries and keys whose dimensions are ordered by strength.
Keeping the first r gives the best rank-r product in the least-squares sense (Eckart and Young,
1936). Keeping all changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float

from gainlens.ablation.key_mask import check_fraction
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export.plan import SlicePlan
from gainlens.export.sources.base import KeyMap, Source
from gainlens.model.attention_weights import AttentionWeights


def to_canonical(
    weights: AttentionWeights,
) -> tuple[AttentionWeights, Float[torch.Tensor, "head d_head"]]:
    """Queries and keys in the canonical basis, and the singular values, strongest first.

    Args:
        weights: attention of a layer in which each query head has its own key head.
    """
    q, k = _extended(weights.q, weights.q_bias), _extended(weights.k, weights.k_bias)
    # Qᵀ = A R, Kᵀ = B S with orthonormal A, B, so that only R Sᵀ (d_head by d_head) is decomposed.
    a, r = torch.linalg.qr(q.transpose(1, 2))
    b, s = torch.linalg.qr(k.transpose(1, 2))
    left, sizes, right = torch.linalg.svd(r @ s.transpose(1, 2))
    root = sizes.sqrt()[:, :, None]
    new_q = root * (a @ left).transpose(1, 2)
    new_k = root * (right @ b.transpose(1, 2))
    dtype = weights.q.dtype
    new_q, new_k = new_q.to(dtype), new_k.to(dtype)
    return (
        replace(
            weights,
            q=new_q[..., :-1],
            k=new_k[..., :-1],
            q_bias=new_q[..., -1],
            k_bias=new_k[..., -1],
        ),
        sizes,
    )


def canonical_plan(model: object, fraction: float = 0.5, scope: str = "head") -> SlicePlan:
    """The plan that keeps the strongest canonical directions of every head.

    Args:
        model: any of the three kinds, of a family without rotation (GPT-2).
        fraction: share of directions to cut, from 0 to below 1.
        scope: ``head`` for the same number in every head; ``layer`` or ``model`` to compare
            squared singular values within a layer or over all of them.

    Raises:
        InputError: the fraction is outside 0..1, or the scope is unknown.
        UnsupportedModelError: the model rotates its keys, so no such basis exists.
    """
    from gainlens.export.sources import open_source

    check_fraction(fraction)
    if fraction == 1:
        raise InputError("fraction=1 cuts everything: expected less than 1")
    if scope not in ("head", "layer", "model"):
        raise InputError(f"scope={scope!r} is not one of head, layer, model")
    source = open_source(model)
    check_no_rotation(source)
    sizes = torch.stack(
        [to_canonical(source.attention(layer))[1].cpu() for layer in range(source.n_layers)]
    ).square()
    flat = {"head": sizes.flatten(0, 1), "layer": sizes.flatten(1), "model": sizes.reshape(1, -1)}
    rows = flat[scope]
    n = max(1, round((1 - fraction) * rows.shape[1]))
    kept = torch.zeros_like(rows, dtype=torch.bool)
    kept.scatter_(1, rows.topk(n, dim=1).indices, True)
    kept = kept.reshape(sizes.shape)
    kept[..., 0] = True
    return SlicePlan(
        kept,
        basis="canonical",
        fingerprint=source.fingerprint,
        facts={
            "order": "strongest",
            "score": "singular value",
            "scope": scope,
            "fraction": fraction,
        },
    )


def check_no_rotation(source: Source) -> None:
    """Raise ``UnsupportedModelError`` unless a head's product of queries and keys has a basis."""
    family, config = source.family, source.config
    if family.rotary_dim(config):
        raise UnsupportedModelError(
            f"{source.architecture} rotates its keys, so no basis of a head can be changed but "
            "within a rotary pair: a canonical plan needs a model without rotation (GPT-2)"
        )
    if between := family.before_maps(config):
        raise UnsupportedModelError(
            f"{source.architecture} has {between} after its projections, which holds in the "
            "model's own basis alone: a canonical plan needs a model without it"
        )
    if family.n_kv_heads(config) != int(config.num_attention_heads):
        raise UnsupportedModelError(
            f"{source.architecture} has query heads that share a key head: a canonical plan needs "
            "one key head for each, for it decomposes one product of queries and keys"
        )


def canonical_maps(source: Source, plan: SlicePlan) -> KeyMap:
    """Matrix that multiplies the keys of each head to drop the directions that are not kept."""
    maps = []
    for layer in range(source.n_layers):
        weights = source.attention(layer)
        thin, _ = to_canonical(weights)
        old, new = _extended(weights.k, weights.k_bias), _extended(thin.k, thin.k_bias)
        # new = M old, so k -> k Mᵀ D M⁻ᵀ drops what D does not keep.
        change = new @ torch.linalg.pinv(old)
        keep = torch.diag_embed(plan.keep[layer].double()).to(change.device)
        maps.append((torch.linalg.pinv(change) @ keep @ change).transpose(1, 2).cpu())
    return torch.stack(maps)


def _extended(
    weight: Float[torch.Tensor, "head d_head d_model"],
    bias: Float[torch.Tensor, "head d_head"] | None,
) -> Float[torch.Tensor, "head d_head d_model_and_one"]:
    """The bias as one more input, in float64."""
    extra = torch.zeros_like(weight[..., 0]) if bias is None else bias
    return torch.cat([weight, extra[..., None]], -1).double()
