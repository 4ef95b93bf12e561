"""The rotation of models that fire no hook after it, measured on their attention pattern.

With queries e_i and keys e_j at every position, the logit depends on the distance Δ as cos(θΔ)
if i = j and as ±sin(θΔ) if i and j rotate together. It is zero for every other j.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from gainlens.errors import UnsupportedModelError
from gainlens.model.families import Family, Pairing
from gainlens.model.sites import pair_partners

VARIES = 1e-3
"""A logit depends on position if it changes by more than this with distance (in nats)."""


def measure_rotation(
    probe: Any, declared: Family | None
) -> tuple[Pairing, int, Float[torch.Tensor, "layer rotary_pair"]]:
    """Pairing, rotary width and frequencies of a model without ``hook_rot_k``.

    Args:
        probe: a ``gainlens.model.verify.SiteProbe``.
        declared: the family's row, if there is one.

    Raises:
        UnsupportedModelError: the model does not use the declared pairing.
    """
    d, layers = probe.d_head, probe.n_layers
    units = torch.arange(d)
    same = _responses(probe, units, units)
    neighbours = _responses(probe, units, (units ^ 1).clamp_max(d - 1))
    rotates = torch.maximum(same.abs(), neighbours.abs()).amax((0, 2)) > VARIES
    first = _responses(probe, torch.zeros(d, dtype=torch.long), units).abs().amax((0, 2))
    first[0] = 0
    if float(first.max()) < VARIES:
        if bool(rotates.any()):
            raise UnsupportedModelError(f"{probe.name}: its first key dimension does not rotate")
        return "none", 0, torch.zeros(layers, 0)
    partner_of_0 = int(first.argmax())
    reach = (int(rotates.nonzero().max()) + 2) // 2 * 2
    config = getattr(getattr(probe.model, "original_model", None), "config", None)
    stated = int(getattr(config, "rotary_dim", None) or 0)
    if reach < stated <= d:  # the slowest pairs hardly rotate within a few tokens
        reach = stated
    pairing: Pairing = "adjacent" if partner_of_0 == 1 and reach > 2 else "half"
    rotary_dim = reach if pairing == "adjacent" else 2 * partner_of_0
    partner = pair_partners(d, rotary_dim, pairing)
    crossed = _responses(probe, units, partner)
    wrong = _responses(probe, units, pair_partners(d, rotary_dim, _other(pairing)))
    pairs = partner != units
    confused = (pair_partners(d, rotary_dim, _other(pairing)) != partner) & pairs
    if bool((wrong.abs().amax((0, 2)) > VARIES)[confused].any()) or (
        declared is not None and declared.pairing != pairing
    ):
        raise UnsupportedModelError(
            f"{probe.name}: its attention does not rotate pairs as "
            f"{declared.pairing if declared else pairing!r}"
        )
    lower = units[(partner > units)]
    # tan(θ/2) = (1 - cos θ) / sin θ at distance 1, then refined at the longest distance.
    coarse = 2 * torch.atan2(-same[:, lower, 0], crossed[:, lower, 0].abs())
    longest = same.shape[-1]
    cos_sin = torch.stack([-same[:, lower, -1], crossed[:, lower, -1]])
    sign = torch.sign(crossed[:, lower, 0])
    fine = 2 * torch.atan2(cos_sin[0], cos_sin[1] * sign)
    laps = ((coarse * longest - fine) / (2 * torch.pi)).round()
    measured = ((fine + 2 * torch.pi * laps) / longest).abs()
    return pairing, rotary_dim, _snap(probe.model, measured, rotary_dim)


def _responses(
    probe: Any, query_units: torch.Tensor, key_units: torch.Tensor
) -> Float[torch.Tensor, "layer row distance"]:
    """Logit at distance 1, 2, … minus the logit at distance 0, for each (query, key) unit."""
    n_pos = min(6, probe.d_head)
    rows = len(query_units)
    eye = torch.eye(probe.d_head, device=probe.device) * 3.0
    queries = eye[query_units][:, None, None, :].expand(rows, n_pos, probe.n_heads, -1)
    keys = eye[key_units][:, None, None, :].expand(rows, n_pos, probe.n_kv_heads, -1)
    zero = probe.attention(torch.zeros_like(queries[:1]), torch.zeros_like(keys[:1]))
    pattern = probe.attention(queries, keys)
    last = pattern[:, :, 0, -1].clamp_min(1e-30).log() - zero[:, :, 0, -1].clamp_min(1e-30).log()
    by_distance = last.flip(-1)
    change: torch.Tensor = (by_distance[..., 1:] - by_distance[..., :1]).double().cpu()
    return change


def _snap(
    model: Any, measured: Float[torch.Tensor, "layer rotary_pair"], rotary_dim: int
) -> Float[torch.Tensor, "layer rotary_pair"]:
    """The exact geometric series, if a configured base agrees with the measurement."""
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    bases = [
        getattr(model.cfg, "rotary_base", None),
        rope.get("rope_theta") if isinstance(rope, dict) else None,
        10000.0,
    ]
    for base in bases:
        if not base:
            continue
        exact = float(base) ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
        if bool(((exact - measured).abs() < 1e-4 + 1e-3 * exact).all()):
            snapped: torch.Tensor = exact.expand(measured.shape).clone()
            return snapped
    return measured


def _other(pairing: Pairing) -> Pairing:
    return "adjacent" if pairing == "half" else "half"
