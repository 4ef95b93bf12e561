"""Gains in each head's canonical basis, for models without rotary embeddings.

Without a rotation, any invertible map M of the keys of a head, with its inverse on the queries,
leaves the logits unchanged, so key dimension i of one head is unrelated to dimension i of another.
The logits do determine the bilinear form W_Q W_Kᵀ. Its singular value decomposition U S Vᵀ gives a
basis, unique up to signs, in which queries U S^½ and keys V S^½ are balanced. Dimensions are sorted
by decreasing singular value.

Biases are rows of the augmented matrices. The weight, bias and centring of the layer norm are
folded in first, so the basis is the same for a folded and an unfolded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.brief import brief
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.errors import InputError, SilentSiteError, UnsupportedModelError
from gainlens.model.attention_layouts import lens_biases, lens_weights
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached
from gainlens.model.running import model_device
from gainlens.model.sites import KeySites
from gainlens.model.tokens import model_batches
from gainlens.probes.gains import ModelCard
from gainlens.probes.scores import get_score

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero: they affect no logit."""


@dataclass(frozen=True, eq=False)
class CanonicalGains:
    """Gains per singular direction of each head's W_Q W_Kᵀ. A direction is not a key dimension, so
    they cannot be turned into a mask.

    Attributes:
        model: the model on which they were gathered.
        moments: averages over tokens, float64 ``[layer, head, direction]``: ``k_mean``, ``k_sq``,
            ``q_sq``.
        singular_values: ``[layer, head, direction]``, in decreasing order.
        n_tokens, n_documents: size of the text.
    """

    model: ModelCard
    moments: dict[str, torch.Tensor]
    singular_values: Float[torch.Tensor, "layer head direction"]
    n_tokens: int
    n_documents: int

    __repr__ = brief

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_heads, d_head)``."""
        return self.model.shape

    def score(self, name: str) -> Float[torch.Tensor, "layer head direction"]:
        """The gain of every direction, float32. ``name`` is a row of the table of scores.

        Raises:
            InputError: the name is unknown, or needs statistics that are not gathered here.
        """
        score = get_score(name)
        moments = {**self.moments}
        moments["k_var"] = moments["k_sq"] - moments["k_mean"].square()
        moments["k_sum"] = moments["k_mean"]
        try:
            return score.compute(moments).float()
        except KeyError as missing:
            raise InputError(
                f"score={name!r} is not supported in a canonical basis: it needs {missing.args[0]}"
            ) from None


def canonical_basis(
    w_q: Float[torch.Tensor, "d_model d_head"],
    w_k: Float[torch.Tensor, "d_model d_head"],
) -> tuple[
    Float[torch.Tensor, "d_head direction"],
    Float[torch.Tensor, "d_head direction"],
    Float[torch.Tensor, " direction"],
]:
    """Maps M_q, M_k with W_Q M_q = U S^½ and W_K M_k = V S^½, where U S Vᵀ = W_Q W_Kᵀ; and S.

    M_q M_kᵀ is the identity if W_Q W_Kᵀ has full rank, so no logit changes. Directions with
    singular value zero, which affect no logit, are mapped to zero. The maps are computed from two
    thin QR factors, so no d_model × d_model matrix is formed.

    Args:
        w_q, w_k: weights of one head, with the bias as an extra row.
    """
    r_q, r_k = (torch.linalg.qr(w.double(), mode="r").R for w in (w_q, w_k))
    u, s, vh = torch.linalg.svd(r_q @ r_k.T)
    seen = s > RANK_TOLERANCE * s[0].clamp_min(torch.finfo(s.dtype).tiny)
    inverse_root = torch.where(seen, s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt(), 0.0)
    return r_k.T @ (vh.T * inverse_root), r_q.T @ (u * inverse_root), torch.where(seen, s, 0.0)


def head_weights(
    model: Any, layer: int
) -> tuple[Float[torch.Tensor, "head row d_head"], Float[torch.Tensor, "head row d_head"]]:
    """W_Q and W_K of every head, with the norm folded in and the bias as last row, float64.

    Raises:
        UnsupportedModelError: the weights cannot be read as ``[head, d_model, d_head]``.
    """
    block = model.blocks[layer]
    centred = "LN" in str(getattr(model.cfg, "normalization_type", ""))
    found = []
    biases = lens_biases(block.attn)
    for weight, bias in zip(lens_weights(block.attn)[:2], biases[:2], strict=True):
        w = weight.transpose(1, 2).double().cpu()
        b = torch.zeros(w.shape[0], 1, w.shape[2], dtype=w.dtype)
        if bias is not None:
            b = bias.double().cpu().reshape(b.shape)
        found.append(_folded(w, b, getattr(block, "ln1", None), centred))
    return found[0], found[1]


def _folded(w: torch.Tensor, bias: torch.Tensor, norm: Any, centred: bool) -> torch.Tensor:
    """The matrix with the weight, bias and centring of the norm folded in, where present."""
    scale, shift = (_parameter(norm, names) for names in (("w", "weight"), ("b", "bias")))
    if shift is not None and shift.shape == w.shape[1:2]:
        bias = bias + (shift @ w)[:, None, :]
    if scale is not None and scale.shape == w.shape[1:2]:
        w = w * scale[None, :, None]
    if centred:
        w = w - w.mean(1, keepdim=True)  # the norm subtracts the mean of its input
    return torch.cat([w, bias], dim=1)


def _parameter(module: Any, names: Sequence[str]) -> torch.Tensor | None:
    for name in names:
        try:
            value = getattr(module, name)
        except AttributeError:
            continue
        if isinstance(value, torch.Tensor):
            return value.detach().double().cpu()
    return None


def canonical_gains(
    model: Any,
    tokens: Tokens,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> CanonicalGains:
    """Gains of a model without rotary embeddings in each head's canonical basis, one pass.

    Args:
        model: a TransformerBridge or HookedTransformer without rotary embeddings.
        tokens: as for ``probe_gains``.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: the model rotates its keys (use rotary pairs instead), or has fewer
            key heads than query heads.
    """
    sites = key_sites(model)
    if sites.rotary_dim:
        raise UnsupportedModelError(
            f"{sites.architecture} rotates its keys, which fixes their basis up to a rotation "
            "of each pair; use coordinate_map(gains), which compares pairs"
        )
    if sites.n_heads != sites.n_kv_heads:
        raise UnsupportedModelError(
            f"{sites.architecture} has {sites.n_heads} query heads on {sites.n_kv_heads} key "
            "heads: one key basis cannot be canonical for several W_Q"
        )
    probe = _CanonicalProbe(model, sites)
    fingerprint = model_fingerprint(model)
    n_documents = 0
    with ExitStack() as stack, tqdm(desc="probe", unit="doc", disable=not progress) as bar:
        stack.enter_context(attached(model, probe.hooks()))
        for batch in model_batches(model, tokens, tokens_per_batch):
            forward_layers(model, batch)
            n_documents += len(batch)
            bar.update(len(batch))
    return probe.gains(fingerprint, n_documents)


class _CanonicalProbe:
    """Sums of keys and queries in the canonical basis."""

    def __init__(self, model: Any, sites: KeySites) -> None:
        self.sites = sites
        bases = []
        for layer in range(sites.n_layers):
            w_q, w_k = head_weights(model, layer)
            bases.append([canonical_basis(q, k) for q, k in zip(w_q, w_k, strict=True)])
        device = model_device(model)
        self.maps = {
            letter: [torch.stack([b[i] for b in row]).float().to(device) for row in bases]
            for i, letter in enumerate("qk")
        }
        self.singular = torch.stack([torch.stack([b[2] for b in row]) for row in bases])
        self.sums = {
            name: torch.zeros(sites.shape, dtype=torch.float64)
            for name in ("k_mean", "k_sq", "q_sq")
        }
        self.tokens = {"k": [0] * sites.n_layers, "q": [0] * sites.n_layers}

    def hooks(self) -> list[Hook]:
        s = self.sites
        return [
            (name(layer, "projected"), partial(self._add, layer=layer, letter=letter))
            for layer in range(s.n_layers)
            for letter, name in (("k", s.key_hook), ("q", s.query_hook))
        ]

    def _add(self, x: torch.Tensor, hook: Any, *, layer: int, letter: str) -> None:
        turned = torch.einsum("bphd,hde->bphe", x.detach().float(), self.maps[letter][layer])
        self.tokens[letter][layer] += x.shape[0] * x.shape[1]
        wide = turned.double().cpu()
        self.sums[f"{letter}_sq"][layer] += wide.square().sum((0, 1))
        if letter == "k":
            self.sums["k_mean"][layer] += wide.sum((0, 1))

    def gains(self, fingerprint: str, n_documents: int) -> CanonicalGains:
        counts = {n for per_layer in self.tokens.values() for n in per_layer}
        if len(counts) != 1 or 0 in counts:
            raise SilentSiteError("some key or query hooks did not fire in the canonical probe")
        n_tokens = counts.pop()
        return CanonicalGains(
            model=ModelCard.of(self.sites, fingerprint),
            moments={name: value / n_tokens for name, value in self.sums.items()},
            singular_values=self.singular.float(),
            n_tokens=n_tokens,
            n_documents=n_documents,
        )
