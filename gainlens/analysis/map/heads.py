"""Similarity between single heads of different layers, also after matching heads.

Head h of one layer is unrelated to head h of the next, so layers are compared twice: by the mean of
their heads (``CoordinateMap.cosine``), which does not depend on the order, and head by head after
the best one-to-one assignment. An optimal assignment finds similar heads by chance too, so its null
repeats the assignment on every shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from gainlens.analysis.map.frequency_profile import FrequencyProfile
from gainlens.analysis.map.nulls import TOLERANCE, Orders
from gainlens.analysis.map.similarity import unit_length
from gainlens.brief import brief

BLOCK_ROWS = 128
"""Heads per matrix product: large enough to be efficient, small enough for the CPU cache."""
MATCHINGS = 30_000
"""Limit on the assignments for the null (about 50 µs each for 32 heads)."""

HEADS_LIMIT = 2048
"""Above this number, heads are compared one by one only on request: the cost is quadratic."""
HEADS_BUDGET = 10_000_000
"""Limit on the gains shuffled for the null of sharing by head; at least 250 permutations run."""


@dataclass(frozen=True, eq=False)
class HeadSimilarity:
    """Similarity between heads; heads are numbered layer · n_heads + head.

    Attributes:
        cosine: ``[layer·head, layer·head]``, float32; 0 for a head that is all zero.
        centred: the same for residuals: gains relative to each head's own profile over frequency
            (its mean if nothing rotates).
        p_raw: one-sided p-value of each pair's centred cosine under the map's ``null``,
            ``[layer·head, layer·head]``, float32; 1 within a layer, where the shuffle is not a
            test.
        p_corrected_cut: the centred cosine above which a pair is significant at 5% after
            correction for all pairs.
        share_significant: the share of head pairs above that.
        matched: mean centred cosine of matched heads, ``[layer, layer]``.
        matched_null: its mean over shuffles, with the matching repeated.
        matched_p: one-sided p-value of the mean over pairs of layers; its resolution is
            1 / (1 + matched_permutations).
        matched_permutations: number of shuffles used for it.
        order: for each layer its heads, in the order of the matching heads of ``reference``.
        reference: the layer to which all others were matched: the one most similar to the rest.
    """

    cosine: Float[np.ndarray, "flat_head flat_head2"]
    centred: Float[np.ndarray, "flat_head flat_head2"]
    p_raw: Float[np.ndarray, "flat_head flat_head2"]
    p_corrected_cut: float
    share_significant: float
    matched: Float[np.ndarray, "layer layer2"]
    matched_null: Float[np.ndarray, "layer layer2"]
    matched_p: float
    matched_permutations: int
    order: Int[np.ndarray, "layer head"]
    reference: int

    __repr__ = brief

    def summary(self) -> dict[str, float]:
        """Means over pairs of heads of different layers, and over matched pairs."""
        n_layers = len(self.matched)
        across = _across(n_layers, len(self.cosine) // n_layers)
        above = np.triu_indices(n_layers, 1)
        return {
            "cosine": float(self.cosine[across].mean()),
            "centred_cosine": float(self.centred[across].mean()),
            "matched_centred_cosine": float(self.matched[above].mean()),
            "matched_null": float(self.matched_null[above].mean()),
            "matched_p": self.matched_p,
            "share_significant": self.share_significant,
        }


def _across(n_layers: int, n_heads: int) -> Bool[np.ndarray, "flat_head flat_head2"]:
    layer = np.repeat(np.arange(n_layers), n_heads)
    different: Bool[np.ndarray, "flat_head flat_head2"] = layer[:, None] != layer[None, :]
    return different


def head_similarity(
    x: Float[np.ndarray, "layer head unit"],
    residuals: Float[np.ndarray, "layer head unit"],
    profile: FrequencyProfile,
    orders: Orders,
    seed: int,
) -> HeadSimilarity:
    """Compare all heads, and layers by their matched heads.

    Args:
        x: gains per unit.
        residuals: their logs minus ``profile``.
        profile: frequency profile of each layer.
        orders: the shuffles.
        seed: seed of the shuffles for the null of the matching.
    """
    n_layers, n_heads, n_units = x.shape
    centred = unit_length(residuals)
    flat = centred.reshape(-1, n_units)
    between = (flat @ flat.T).astype(np.float32)
    length = unit_length(x.reshape(-1, n_units)).astype(np.float32)
    p_raw, cut, share = _shuffled_heads(centred, profile, orders)
    blocks = between.reshape(n_layers, n_heads, n_layers, n_heads).transpose(0, 2, 1, 3)
    matched, null, p_matched, used = _matching(blocks, residuals, profile, orders, seed)
    reference = int(matched.sum(1).argmax())
    order = np.stack([_assign(blocks[reference, layer])[1] for layer in range(n_layers)])
    return HeadSimilarity(
        cosine=length @ length.T,
        centred=between,
        p_raw=p_raw,
        p_corrected_cut=cut,
        share_significant=share,
        matched=matched,
        matched_null=null,
        matched_p=p_matched,
        matched_permutations=used,
        order=order,
        reference=reference,
    )


def _shuffled_heads(
    rows: Float[np.ndarray, "layer head unit"], profile: FrequencyProfile, orders: Orders
) -> tuple[np.ndarray, float, float]:
    """Raw p-values, the 5% threshold for the maximum over pairs, and the share of pairs above it.

    Only blocks above the diagonal are computed.
    """
    n_layers, n_heads, n_units = rows.shape
    n = n_layers * n_heads
    step = n_heads * max(1, BLOCK_ROWS // n_heads)
    spans = [(a, min(a + step, n), a + n_heads) for a in range(0, n - n_heads, step)]
    small = np.ascontiguousarray(rows, dtype=np.float32)
    flat = torch.from_numpy(small).reshape(n, n_units)
    layer = torch.arange(n_layers).repeat_interleave(n_heads)
    observed, reached, outside, work = [], [], [], []
    for a, b, c in spans:
        block = flat[a:b] @ flat[c:].T
        same = layer[a:b, None] >= layer[None, c:]
        block[same] = 9.0  # never reached, so never counted
        observed.append(block - TOLERANCE)
        reached.append(torch.zeros(block.shape, dtype=torch.float32))
        outside.append(torch.where(same, -9.0, 0.0) if bool(same.any()) else None)
        work.append((torch.empty_like(block), torch.empty_like(block)))
    largest = np.empty(len(orders))
    for i in range(len(orders)):
        moved = torch.from_numpy(_null_rows(small, profile, orders[i : i + 1]).reshape(n, n_units))
        top = -1.0
        for k, (a, b, c) in enumerate(spans):
            product, hit = work[k]
            torch.mm(moved[a:b], moved[c:].T, out=product)
            torch.ge(product, observed[k], out=hit)
            reached[k] += hit
            extra = outside[k]
            if extra is not None:
                product += extra
            top = max(top, float(product.max()))
        largest[i] = top
    cut = float(np.quantile(largest, 0.95, method="higher"))
    p = np.ones((n, n), dtype=np.float32)
    above = pairs = 0
    for k, (a, b, c) in enumerate(spans):
        tested = (observed[k] < 5).numpy()
        values = ((1 + reached[k]) / (1 + len(orders))).numpy()
        p[a:b, c:] = np.where(tested, values, p[a:b, c:])
        above += int((tested & (observed[k].numpy() + TOLERANCE > cut + TOLERANCE)).sum())
        pairs += int(tested.sum())
    return np.minimum(p, p.T), cut, above / max(pairs, 1)


def _null_rows(
    rows: Float[np.ndarray, "layer head unit"], profile: FrequencyProfile, order: Orders
) -> Float[np.ndarray, "layer head unit"]:
    """Rows of length 1 under one shuffle."""
    return unit_length(next(profile.shuffled(rows, order))[0])


def _assign(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = linear_sum_assignment(block, maximize=True)
    return rows, columns


def _matching(
    blocks: Float[np.ndarray, "layer layer2 head head2"],
    rows: Float[np.ndarray, "layer head unit"],
    profile: FrequencyProfile,
    orders: Orders,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Mean centred cosine of matched heads for every pair of layers, its null and its p-value.

    Under the null only the relative order of two layers matters, so shuffles are drawn per pair
    of layers, as many as the budget allows.
    """
    n_layers = len(blocks)
    matched, null = np.eye(n_layers), np.eye(n_layers)
    i, j = np.triu_indices(n_layers, 1)
    used = int(max(19, min(len(orders), MATCHINGS // len(i))))
    chosen = np.random.default_rng(seed).permutation(len(orders))[:used]
    draws = np.empty((len(chosen), len(i)))
    for a, b in zip(i, j, strict=True):
        matched[a, b] = matched[b, a] = blocks[a, b][_assign(blocks[a, b])].mean()
    flat = rows.astype(np.float32)
    for row, number in enumerate(chosen):
        moved = _null_rows(flat, profile, orders[number : number + 1])
        every = moved.reshape(-1, moved.shape[-1])
        products = (every @ every.T).reshape(n_layers, rows.shape[1], n_layers, rows.shape[1])
        for column, (a, b) in enumerate(zip(i, j, strict=True)):
            block = products[a, :, b]
            draws[row, column] = block[_assign(block)].mean()
    null[i, j] = null[j, i] = draws.mean(0)
    seen = matched[i, j].mean()
    p = (1 + int((draws.mean(1) >= seen - TOLERANCE).sum())) / (1 + len(chosen))
    return matched, null, float(p), len(chosen)
