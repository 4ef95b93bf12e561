"""Verify a model's own cosines and sines against its keys; measure its attention logit scale."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gainlens.errors import UnsupportedModelError
from gainlens.model.rotary_tables import read_tables
from gainlens.model.rotation import Following, Rotation, Turn, angle_frequencies
from gainlens.model.running import is_exact

N_POS = 6
LAYOUTS: tuple[Literal["halves", "neighbours"], ...] = ("halves", "neighbours")
FIXED = ("default", "linear", "llama3")
"""RoPE types with scale 1 and frequencies that do not depend on the length."""


def model_rotary_dim(following: Following) -> int | None:
    """Width of the cosines that the model passes to its layers, or None if it passes none."""
    for layer, call in following.given.items():
        angles = call.get("position_embeddings")
        if isinstance(angles, tuple):
            return int(angles[0].shape[-1])
        tables = getattr(following._attention(layer), "rotary_cos", None)
        if tables is not None:
            return int(tables.shape[-1])
    return None


def follow_rotated_keys(
    probe: Any,
    following: Following,
    keys: Float[torch.Tensor, "layer pos kv_head d_head"],
    frequencies: Float[torch.Tensor, "layer rotary_pair"],
    partner: Int[torch.Tensor, " d_head"],
    tolerance: float,
) -> Rotation:
    """The rotation of a model with readable rotated keys.

    Args:
        probe: a ``gainlens.model.verify.SiteProbe``.
        following: from the pass in which ``keys`` were read.
        keys: the same key at every position, after the rotation.
        frequencies, partner: measured on ``keys``.
        tolerance: maximum error of a key, relative to the largest entry.
    """

    def fits(rotation: Rotation) -> bool:
        read = Following(rotation, following.given)
        for layer, row in enumerate(keys.float()):
            turn = read.turn("k", layer, keys.shape[1])
            start = turn.at(torch.tensor([0])).heads(row[None, :1].contiguous(), inverse=True)
            turned = turn.heads(start.expand(1, *row.shape).contiguous())[0]
            if float((turned - row).abs().max()) > tolerance * float(row.abs().max()):
                return False
        return True

    return _followed(probe, following, frequencies, partner, fits, keys.shape[1])


def follow_silent(
    probe: Any,
    frequencies: Float[torch.Tensor, "layer rotary_pair"],
    partner: Int[torch.Tensor, " d_head"],
) -> Rotation:
    """The rotation of a model without readable rotated keys, verified on its attention.

    Raises:
        UnsupportedModelError: neither the model's own cosines nor the measured frequencies
            reproduce the model's attention.
    """
    following = Following(Rotation.unknown(probe.model, probe.n_layers, probe.d_head))
    scores = _Scores(probe, "projected", following)
    plain = Rotation(frequencies, partner, None, _plain(probe.model), weakref.ref(probe.model))
    if not plain.turns:
        return plain
    tolerance = 1e-2 if is_exact(probe.model) else 1e-1

    def fits(rotation: Rotation) -> bool:
        read = Following(rotation, following.given)
        return max(scores.fit(layer, read)[1] for layer in range(probe.n_layers)) < tolerance

    found = _followed(probe, following, frequencies, partner, fits, scores.n_pos)
    if found.layout is None and plain.plain and not fits(plain):
        raise UnsupportedModelError(
            f"{probe.name}: its attention does not match queries and keys rotated by the measured "
            "frequencies, and it passes no cosines to its layers"
        )
    return found


def _followed(
    probe: Any,
    following: Following,
    frequencies: torch.Tensor,
    partner: torch.Tensor,
    fits: Callable[[Rotation], bool],
    n_pos: int,
) -> Rotation:
    model = probe.model
    plain = Rotation(frequencies, partner, None, _plain(model), weakref.ref(model))
    if not plain.turns:
        return plain
    tables = read_tables(model, lambda: probe.run(1, n_pos, []), probe.n_layers)
    for layout in LAYOUTS:
        found = Rotation(frequencies, partner, layout, plain.plain, plain.model, tables)
        if model_rotary_dim(following) is None or not fits(found):
            continue
        exact = _own_frequencies(found, following, n_pos)
        return Rotation(exact, partner, layout, plain.plain, plain.model, tables)
    return plain


def _own_frequencies(
    rotation: Rotation, following: Following, n_pos: int
) -> Float[torch.Tensor, "layer rotary_pair"]:
    """Frequencies from the model's own cosines, which also cover pairs with zero keys."""
    units = torch.arange(len(rotation.partner))
    lower = units[rotation.partner > units]
    read = Following(rotation, following.given)
    rows = []
    for layer in range(len(rotation.frequencies)):
        turn = read.turn("k", layer, n_pos)
        sin, cos = -turn.sin[..., lower], turn.cos[..., lower]
        angle = torch.atan2(sin, cos).double().cpu().reshape(-1, n_pos, len(lower))
        rows.append(angle[0])
    return angle_frequencies(torch.stack(rows))


def logit_scale(
    probe: Any, rotation: Rotation, stage: Literal["projected", "rotated"]
) -> tuple[float, ...]:
    """Factor on the query-key product of each layer, measured on its attention pattern.

    If a value from the configuration agrees with the measurement, that value is returned.

    Args:
        probe: a ``gainlens.model.verify.SiteProbe``.
        rotation: rotation of the probed model.
        stage: stage at which queries and keys can be set.
    """
    following = rotation.follow() if stage == "projected" else None
    scores = _Scores(probe, stage, following)
    tolerance = 1e-3 if is_exact(probe.model) else 5e-2
    found = []
    for layer in range(probe.n_layers):
        measured = scores.fit(layer, following)[0]
        near = [c for c in _named_scales(probe, layer) if abs(c / measured - 1) < tolerance]
        found.append(min(near, key=lambda c: abs(c / measured - 1)) if near else measured)
    return tuple(found)


class _Scores:
    """Random queries and keys, and the resulting attention of every layer."""

    def __init__(self, probe: Any, stage: Any, following: Following | None) -> None:
        self.n_pos = n_pos = min(N_POS, probe.d_head, probe.n_pos)
        # Logits of about half a nat: a soft cap distorts larger ones.
        self.queries = 0.7 * probe.random(2, n_pos, probe.n_heads, probe.d_head)
        self.keys = 0.7 * probe.random(2, n_pos, probe.n_kv_heads, probe.d_head)
        zeros = torch.zeros_like(self.queries), torch.zeros_like(self.keys)
        self.group = probe.n_heads // probe.n_kv_heads
        bias = probe.attention(*zeros, stage)
        self.pattern = probe.attention(self.queries, self.keys, stage, following)
        self.seen = (self.pattern > 1e-20) & (bias > 1e-20)
        self.logits = (self.pattern.clamp_min(1e-30) / bias.clamp_min(1e-30)).log()

    def fit(self, layer: int, following: Following | None) -> tuple[float, float]:
        """Least-squares scale of a layer's logits, and the largest absolute residual."""
        q, k = self.queries, self.keys
        if following is not None:
            turned: list[torch.Tensor] = []
            for letter, x in (("q", q), ("k", k)):
                turn: Turn = following.turn(letter, layer, self.n_pos)
                turned.append(turn.heads(x))
            q, k = turned
        dots = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(self.group, 2))
        seen = self.seen[layer]
        wanted, dots = (_centred(x.double(), seen) for x in (self.logits[layer], dots))
        scale = float((wanted * dots).sum() / dots.square().sum().clamp_min(1e-30))
        return scale, float((wanted - scale * dots).abs().max())


def _centred(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    mean = (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    centred: torch.Tensor = torch.where(seen, x - mean, 0.0)
    return centred


def _named_scales(probe: Any, layer: int) -> list[float]:
    """Candidate scales according to the configuration."""
    cfg = probe.model.cfg
    config = getattr(getattr(probe.model, "original_model", None), "config", None)
    usual = float(probe.d_head) ** -0.5
    found = [usual, 1.0, usual / (layer + 1), 1.0 / (layer + 1)]
    special = getattr(config, "query_pre_attn_scalar", None)
    if special:
        found.append(float(special) ** -0.5)
    for value in (getattr(config, "attention_multiplier", None),):
        found += [float(value)] if value else []
    own = float(getattr(cfg, "attn_scale", None) or -1.0)
    return found + ([1 / own] if own > 0 else [])


def _plain(model: Any) -> bool:
    """Whether the configured rotation has the same frequencies at every length."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kinds = [part.get("rope_type", part.get("type")) for part in parts]
    return all(kind is None or kind in FIXED for kind in kinds)
