"""``fit_slots``: choose slot frequencies, give each head's pairs to them, and fit the maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.ablation.fit_passes import fit_in_passes
from gainlens.ablation.fitting import (
    RIDGES,
    Fitted,
    Settings,
    calibration,
    text_facts,
    weighted_logits,
)
from gainlens.ablation.key_mask import KeyMask, check_fraction
from gainlens.ablation.least_squares import Maps
from gainlens.ablation.recorded_attention import RecordedAttention, record_attention
from gainlens.ablation.slot_choice import (
    assign,
    choose_slots,
    frequency_grid,
    narrower_grid,
    overlaps,
    share_out,
    worth_by_slots,
)
from gainlens.ablation.slot_cut import SlotCut
from gainlens.data.batches import Tokens
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import check_intact
from gainlens.model.sites import KeySites
from gainlens.probes.gains import KeyGains

SLOT_SCOPES = ("head", "layer", "universal")
BUDGETS = ("even", "damage")


def fit_slots(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fraction: float = 0.5,
    scope: str = "universal",
    *,
    score: str = "fisher",
    grid: bool = False,
    budget: str = "even",
    context: int | None = None,
    rounds: int = 6,
    iterations: int = 6,
    ridge: float | Sequence[float] = RIDGES,
    uniform: float = 0.2,
    stride: int | None = None,
    passes: int = 1,
    progress: bool = True,
) -> SlotCut:
    """Keep as many rotary slots as ``fraction`` leaves, at frequencies that all heads can use.

    A head's content need not stay at the frequencies where it is: a pair moves into a slot that
    turns nearly as fast, with a linear map of the whole head. So heads that need different pairs
    can share one set of frequencies, as engines want it. The frequencies are those that serve the
    whole model best, over the distances at which its heads attend on this text; the maps are fitted
    to the attention logits as in ``gainlens.refit``, whose other arguments are the same here.

    Args:
        model: a TransformerBridge or HookedTransformer whose whole heads rotate.
        tokens: calibration text, documents of any lengths, as long and of the domains that the cut
            is for.
        gains: of the model, with ``score``.
        fraction: share of the rotary pairs to cut, above 0 and below 1.
        scope: what shares a set of slot frequencies: each ``head`` or ``layer`` has its own, or one
            ``universal`` set serves all.
        score: the importance of a pair.
        grid: take the default geometric frequencies of a narrower head instead of choosing, for
            engines that know no others.
        budget: how many slots a head or a layer gets: ``even`` gives all the same, ``damage`` gives
            them where they are predicted to save most, at the same total. With the scope
            ``universal`` there is nothing to share out.
        context: distances that count, in tokens; by default the longest document's.
        rounds, iterations, ridge, uniform, stride, passes: of the fit; see ``gainlens.refit``.
        progress: show progress bars.

    Raises:
        InputError: a fraction or setting out of range, a scope without shared slots, gains of
            another model, text shorter than ``context``.
        UnsupportedModelError: heads that do not rotate whole; attention that the fit does not
            describe.

    Example:
        >>> gains = gl.probe_gains(model, calibration, scores=("fisher",))
        >>> cut = fit_slots(model, calibration, gains, 0.5, "universal")
        >>> slim = gl.slim(model, cut)
    """
    settings = Settings(rounds, iterations, ridge, uniform, stride, passes)
    check_fraction(fraction)
    if not 0 < fraction < 1:
        raise InputError(f"fraction={fraction!r}: expected above 0 and below 1")
    if scope not in SLOT_SCOPES:
        raise InputError(f"scope={scope!r}: slots are shared by one of {', '.join(SLOT_SCOPES)}")
    if budget not in BUDGETS:
        raise InputError(f"budget={budget!r} is not one of {', '.join(BUDGETS)}")
    if budget == "damage" and (grid or scope == "universal"):
        raise InputError(
            "budget='damage': with grid=True or scope='universal' all heads have as many slots"
        )
    sites = key_sites(model)
    if gains.shape != sites.shape:
        raise InputError(
            f"gains have shape {gains.shape}: this model ({sites.architecture}) has {sites.shape}"
        )
    check_rotation(sites)
    importance = gains.score(score, unit="pair")[..., _lower(sites)]
    check_intact(model, "fit_slots")
    documents = calibration(model, tokens, sites.d_head)
    longest = max(map(len, documents))
    if context is not None and not 2 <= context <= longest:
        raise InputError(
            f"context={context!r}: expected from 2 up to the {longest} tokens of the longest "
            "document of tokens"
        )
    facts = text_facts(model, documents)
    spacing = settings.spacing([len(d) for d in documents])
    n_slots = max(1, round((1 - fraction) * sites.d_head / 2))
    with record_attention(model, documents, spacing, progress=progress) as record:
        reach = attended_distances(record, settings.uniform)[..., :context]
        frequencies, assigned, turned, explained = choose(
            sites, importance.double(), reach, n_slots, scope, grid, budget
        )
        keep = torch.zeros(sites.shape, dtype=torch.bool)
        for side in _pair_dims(sites).T:
            keep[..., side] = assigned >= 0

        def start(layer: int, head: int) -> Maps:
            return start_maps(sites, assigned[layer, head], turned[layer, head])

        chosen_on = {"texts": list(gains.texts), "documents": list(gains.documents)}
        mask = KeyMask(keep, {"fingerprint": gains.model.fingerprint, **chosen_on})

        def cut_of(found: Fitted) -> SlotCut:
            return SlotCut(
                mask, found.queries, found.keys, frequencies, sites.frequencies, assigned
            )

        found = fit_in_passes(
            model, documents, record, keep, frequencies, start, cut_of, settings, progress, "slots"
        )
    facts |= {
        "method": "rotary slots, least squares on attention logits",
        "fraction": fraction,
        "scope": scope,
        "score": score,
        "grid": grid,
        "budget": budget,
        "context": context or longest,
        "explained": explained,
        **found.facts(settings, spacing),
    }
    return SlotCut(mask, found.queries, found.keys, frequencies, sites.frequencies, assigned, facts)


def check_rotation(sites: KeySites) -> None:
    """Raise ``UnsupportedModelError`` unless every dimension of every head rotates."""
    still = [n for n, row in enumerate(sites.frequencies) if not bool(row.any())]
    if still and sites.rotary_dim:
        raise UnsupportedModelError(
            f"{sites.architecture}: layer {still[0]} does not rotate, so it has no frequencies to "
            "share; slots need all layers to"
        )
    if sites.rotary_dim != sites.d_head:
        raise UnsupportedModelError(
            f"{sites.architecture}: {sites.rotary_dim} of the {sites.d_head} dimensions of a key "
            "head rotate; slots need all of them to"
        )


def attended_distances(
    record: RecordedAttention, uniform: float
) -> Float[torch.Tensor, "layer kv_head distance"]:
    """Weight of each distance between query and key, per key head; float64, a sum over queries.

    Args:
        record: of the intact model.
        uniform: share of a query's weight that is spread evenly over the keys that it sees.
    """
    sites, longest = record.sites, max(record.lengths)
    total = torch.zeros(sites.n_layers, sites.n_kv_heads, longest, dtype=torch.float64)
    for layer in range(sites.n_layers):
        for queries, keys, at in record.layer(layer):
            distance = (at[:, None] - torch.arange(len(keys))).clamp_min(0).flatten()
            for head in range(sites.n_kv_heads):
                rows = slice(head * sites.group_size, (head + 1) * sites.group_size)
                _, weights, _ = weighted_logits(
                    record.attention[layer],
                    queries[:, rows].transpose(0, 1)[:, None],
                    keys[None, :, head],
                    at[None],
                    uniform,
                )
                total[layer, head] += torch.bincount(
                    distance, weights.sum(0).flatten().double(), minlength=longest
                )
    return total


def choose(
    sites: KeySites,
    importance: Float[torch.Tensor, "layer kv_head pair"],
    reach: Float[torch.Tensor, "layer kv_head distance"],
    n_slots: int,
    scope: str,
    grid: bool,
    budget: str = "even",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Slots for every head.

    Args:
        sites: of the model.
        importance: of each pair.
        reach: weight of each distance.
        n_slots: per head.
        scope: what shares them.
        grid: take ``narrower_grid`` of each layer (universal: of the first).
        budget: see ``fit_slots``.

    Returns:
        Frequencies and assigned pairs ``[layer, kv_head, pair]`` (the first ones; -1 after them),
        the complex overlap of each slot with its pair, and the share of all importance explained.
    """
    own = sites.frequencies.double().numpy()
    heads = [(n, h) for n in range(sites.n_layers) for h in range(sites.n_kv_heads)]
    groups: dict[Any, list[tuple[int, int]]] = {}
    for n, h in heads:
        shared_by = {"head": (n, h), "layer": n, "universal": None}[scope]
        groups.setdefault(shared_by, []).append((n, h))
    shape = (*importance.shape[:2], own.shape[1])
    frequencies = torch.zeros(shape, dtype=torch.float64)
    assigned = torch.full(shape, -1)
    turned = torch.zeros(shape, dtype=torch.complex128)
    worth = 0.0
    found = []
    for members in groups.values():
        layers = sorted({n for n, _ in members})
        first = own[layers[0]]
        candidates = narrower_grid(first, n_slots) if grid else frequency_grid(own[layers])
        overlap = {(n, h): overlaps(own[n], candidates, reach[n, h].numpy()) for n, h in members}
        values = [
            importance[n, h].numpy()[:, None] * np.abs(overlap[n, h]) ** 2 for n, h in members
        ]
        found.append((members, candidates, overlap, values))
    counts = [n_slots] * len(found)
    if budget == "damage":
        added = [worth_by_slots(values, own.shape[1]) for *_, values in found]
        counts = share_out(added, n_slots * len(found))
    for (members, candidates, overlap, values), n in zip(found, counts, strict=True):
        slots = list(range(n)) if grid else choose_slots(values, n)
        for at, value in zip(members, values, strict=True):
            gained, pairs = assign(value[:, slots])
            worth += gained
            frequencies[at][:n] = torch.from_numpy(candidates[slots])
            assigned[at][:n] = torch.from_numpy(pairs)
            turned[at][:n] = torch.from_numpy(overlap[at][pairs, slots])
    return frequencies, assigned, turned, worth / max(float(importance.sum()), 1e-300)


def start_maps(
    sites: KeySites,
    assigned: torch.Tensor,
    turned: torch.Tensor,
) -> Maps:
    """Plain selection of the assigned pairs into the slots, queries turned and scaled to fit.

    Args:
        sites: of the model.
        assigned: pair of each slot, -1 after the last.
        turned: overlap of each slot with its pair.
    """
    pairs = assigned[assigned >= 0]
    n, d = len(pairs), sites.d_head
    source = _pair_dims(sites)[pairs]
    # Kept dimensions are sorted, so a slot's two rows lie where its pair lies among them.
    target = torch.argsort(torch.argsort(_pair_dims(sites)[:n].flatten())).reshape(n, 2)
    m_k = torch.zeros(2 * n, d, dtype=torch.float32)
    m_q = torch.zeros(2 * n, d, dtype=torch.float32)
    for side in (0, 1):
        m_k[target[:, side], source[:, side]] = 1.0
        m_q[target[:, side], source[:, side]] = turned[:n].real.float()
    m_q[target[:, 0], source[:, 1]] = -turned[:n].imag.float()
    m_q[target[:, 1], source[:, 0]] = turned[:n].imag.float()
    return m_q.expand(sites.group_size, -1, -1).clone(), m_k


def _lower(sites: KeySites) -> torch.Tensor:
    units = torch.arange(sites.d_head)
    return units[sites.partner > units]


def _pair_dims(sites: KeySites) -> torch.Tensor:
    """The two dimensions of each rotary pair, ``[pair, 2]``."""
    lower = _lower(sites)
    return torch.stack([lower, sites.partner[lower]], 1)
