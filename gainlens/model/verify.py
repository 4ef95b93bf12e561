"""Measure on the model itself how its keys are laid out, grouped and rotated.

Constant keys are inserted at ``hook_k`` and the result is measured, so no configuration flag is
trusted. A rotary pair keeps its norm at every position; a wrong pair does not. A key head affects
the attention of its own query heads only. Models that fire no hook after the rotation are measured
through their attention pattern (``gainlens.model.silent_rotation``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model import silent_rotation
from gainlens.model.families import FAMILIES, Pairing
from gainlens.model.followed_rotation import (
    follow_rotated_keys,
    follow_silent,
    logit_scale,
    model_rotary_dim,
)
from gainlens.model.hooks import Hook, attached, hook_point
from gainlens.model.original import check_against_original
from gainlens.model.rotation import Following, Rotation, angle_frequencies
from gainlens.model.running import evaluating, is_exact, model_device
from gainlens.model.sites import KeySites, Stage, pair_partners
from gainlens.model.stored_weights import check_readable

N_POS = 24
DEAD = 1e-10
"""A pair with less than this share of the largest energy is dead (Gemma 3's norms cause some)."""


def measure_sites(model: Any) -> KeySites:
    """Probe ``model`` with a few tokens; see ``gainlens.model.sites.key_sites``."""
    check_readable(model)
    cfg = model.cfg
    architecture = _architecture(model)
    n_layers, n_heads, d_head = int(cfg.n_layers), int(cfg.n_heads), int(cfg.d_head)
    n_kv_heads = int(getattr(cfg, "n_key_value_heads", None) or n_heads)
    probe = SiteProbe(model, architecture, n_layers, n_heads, n_kv_heads, d_head)
    rotated_fires = probe.check_layout()
    norm = probe.check_attention()
    declared = FAMILIES.get(architecture)
    if rotated_fires:
        following = Following(Rotation.unknown(model, n_layers, d_head))
        keys, norm = probe.rotated_keys(following)
        tolerance = 1e-3 if is_exact(model) else 4e-2
        pairing, rotary_dim = find_pairing(
            keys,
            declared.pairing if declared else None,
            probe.name,
            tolerance,
            model_rotary_dim(following),
        )
        frequencies = pair_frequencies(keys, pairing, rotary_dim)
        partner = pair_partners(d_head, rotary_dim, pairing)
        rotation = follow_rotated_keys(probe, following, keys, frequencies, partner, tolerance)
        scale = logit_scale(probe, rotation, "rotated")
    else:
        if norm:
            raise UnsupportedModelError(
                f"{architecture} normalises its keys after hook_k and fires no hook after the "
                "norm, so nothing can be cut without changing the kept dimensions"
            )
        pairing, rotary_dim, frequencies = silent_rotation.measure_rotation(probe, declared)
        partner = pair_partners(d_head, rotary_dim, pairing)
        rotation = follow_silent(probe, frequencies, partner)
        scale = logit_scale(probe, rotation, "projected")
    if pairing == "none":
        _refuse_refactored(model, architecture)
    check_against_original(model, architecture)
    return KeySites(
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        pairing=pairing,
        rotary_dim=rotary_dim,
        rotation=rotation,
        logit_scale=scale,
        rotated_fires=rotated_fires,
        norm_after_projection=norm,
    )


class SiteProbe:
    """A few forward passes with queries, keys and values replaced by known ones."""

    def __init__(
        self, model: Any, name: str, n_layers: int, n_heads: int, n_kv_heads: int, d_head: int
    ) -> None:
        self.model, self.name = model, name
        self.n_layers, self.n_heads, self.n_kv_heads = n_layers, n_heads, n_kv_heads
        self.d_head = d_head
        self.device = model_device(model)
        self.generator = torch.Generator().manual_seed(0)
        self.n_pos = min(N_POS, int(getattr(model.cfg, "n_ctx", N_POS) or N_POS))
        for layer in range(n_layers):
            for letter in ("q", "k", "v", "z"):
                self._require(f"blocks.{layer}.attn.hook_{letter}")

    def _require(self, name: str) -> None:
        if hook_point(self.model, name) is None:
            raise UnsupportedModelError(
                f"{self.name} has no hook {name}: every layer must be an attention layer with "
                "its own keys (no state-space, linear-attention or shared-key layers)"
            )

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, the same on every machine."""
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def run(self, rows: int, n_pos: int, hooks: list[Hook]) -> None:
        """One forward pass of ``rows`` × ``n_pos`` arbitrary tokens, without a loss."""
        tokens = torch.randint(
            0, int(self.model.cfg.d_vocab), (rows, n_pos), generator=self.generator
        ).to(self.device)
        with torch.inference_mode(), attached(self.model, hooks), evaluating(self.model):
            self.model(tokens, return_type="logits")

    def check_layout(self) -> bool:
        """Check the layout of every site; True when ``hook_rot_k`` fires in every layer."""
        shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        finite: list[bool] = []

        def record(tensor: torch.Tensor, hook: Any, *, site: tuple[str, int]) -> None:
            shapes[site] = tuple(tensor.shape)
            finite.append(bool(torch.isfinite(tensor).all()))

        hooks: list[Hook] = []
        for layer in range(self.n_layers):
            for letter in ("q", "k", "rot_q", "rot_k"):
                name = f"blocks.{layer}.attn.hook_{letter}"
                if hook_point(self.model, name) is not None:
                    hooks.append((name, partial(record, site=(letter, layer))))
        self.run(1, 4, hooks)
        if not all(finite):
            raise InputError(
                f"model={self.name}: its keys or queries are not finite on ordinary tokens; "
                "expected weights without NaN or infinity"
            )
        fired = {
            letter: sum((letter, layer) in shapes for layer in range(self.n_layers))
            for letter in ("q", "k", "rot_q", "rot_k")
        }
        for letter in ("q", "k"):
            if fired[letter] < self.n_layers:
                silent = [i for i in range(self.n_layers) if (letter, i) not in shapes]
                raise UnsupportedModelError(
                    f"{self.name}: hook_{letter} did not fire in layers {silent}"
                )
        rotated = fired["rot_k"] == self.n_layers and fired["rot_q"] == self.n_layers
        if fired["rot_k"] and not rotated:
            raise UnsupportedModelError(
                f"{self.name} fires hook_rot_k in only {fired['rot_k']} of {self.n_layers} layers"
            )
        for (letter, layer), shape in shapes.items():
            heads = self.n_kv_heads if letter.endswith("k") else self.n_heads
            expected = (1, 4, heads, self.d_head)
            if shape != expected:
                raise UnsupportedModelError(
                    f"{self.name}: hook_{letter} of layer {layer} carries {shape}, expected "
                    f"[batch, pos, head, d_head] = {expected}"
                    + _layout_hint(shape, self.n_heads, self.d_head)
                )
        return rotated

    def attention(
        self,
        queries: Float[torch.Tensor, "row pos head d_head"],
        keys: Float[torch.Tensor, "row pos kv_head d_head"],
        stage: Stage = "projected",
        following: Following | None = None,
    ) -> Float[torch.Tensor, "layer row head pos key_pos"]:
        """The attention pattern of every layer for the given queries and keys at a stage.

        Values are set to one-hot position vectors, so ``hook_z`` equals the pattern, even for
        models that fire no pattern hook. Works for at most ``d_head`` positions.
        """
        rows, n_pos = keys.shape[:2]
        found: dict[int, torch.Tensor] = {}

        def put(tensor: torch.Tensor, hook: Any, *, value: torch.Tensor) -> torch.Tensor:
            return value.to(tensor.dtype).expand(tensor.shape)

        def put_marks(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            marks = torch.eye(n_pos, tensor.shape[-1], device=tensor.device, dtype=tensor.dtype)
            return marks[None, :, None, :].expand(tensor.shape).clone()

        def read(tensor: torch.Tensor, hook: Any, *, layer: int) -> None:
            z = tensor.reshape(rows, n_pos, self.n_heads, -1)
            found[layer] = z[..., :n_pos].float().permute(0, 2, 1, 3).clone()

        hooks: list[Hook] = following.hooks() if following is not None else []
        rot = "rot_" if stage == "rotated" else ""
        for layer in range(self.n_layers):
            prefix = f"blocks.{layer}.attn.hook_"
            hooks += [
                (f"{prefix}{rot}q", partial(put, value=queries)),
                (f"{prefix}{rot}k", partial(put, value=keys)),
                (prefix + "v", put_marks),
                (prefix + "z", partial(read, layer=layer)),
            ]
        self.run(rows, n_pos, hooks)
        if len(found) < self.n_layers:
            raise UnsupportedModelError(
                f"{self.name}: hook_z did not fire, so its attention can't be verified"
            )
        return torch.stack([found[layer] for layer in range(self.n_layers)])

    def check_attention(self) -> bool:
        """Verify causality and the grouping of heads; True if a norm follows the projection.

        Row g of the probe has keys only in key head g. The next row has no keys, the next has keys
        in all heads, and the last has them doubled: without a norm, doubled keys double every
        logit difference.
        """
        n_pos, n_kv = min(4, self.d_head), self.n_kv_heads
        full = self.random(1, n_pos, n_kv, self.d_head)
        keys = torch.zeros(n_kv + 3, n_pos, n_kv, self.d_head, device=self.device)
        for g in range(n_kv):
            keys[g, :, g] = full[0, :, g]
        keys[n_kv + 1], keys[n_kv + 2] = full[0], 2 * full[0]
        queries = self.random(1, n_pos, self.n_heads, self.d_head).expand(n_kv + 3, -1, -1, -1)
        pattern = self.attention(queries, keys)
        above = torch.triu(torch.ones(n_pos, n_pos, device=self.device), 1).bool()
        if float(pattern[..., above].abs().max()) > 1e-6:
            raise UnsupportedModelError(f"{self.name}: attention is not causal")
        moved = (pattern[:, :n_kv] - pattern[:, n_kv, None]).abs().amax((-1, -2)) > 1e-4
        group = self.n_heads // n_kv
        expected = torch.arange(self.n_heads) // group == torch.arange(n_kv)[:, None]
        if self.n_heads % n_kv or not bool((moved.cpu() == expected).all()):
            raise UnsupportedModelError(
                f"{self.name}: key head g does not feed query heads g·{group} … in every layer, "
                "so gains per key head would be wrong"
            )
        rows = pattern[:, n_kv:, :, -1].clamp_min(1e-30).log()
        single, double = rows[:, 1] - rows[:, 0], rows[:, 2] - rows[:, 0]
        single, double = (x - x[..., -1:] for x in (single, double))
        return bool((double - 2 * single).abs().max() > 0.02 * single.abs().max())

    def rotated_keys(
        self, following: Following
    ) -> tuple[Float[torch.Tensor, "layer pos kv_head d_head"], bool]:
        """Constant keys inserted at ``hook_k``, as read at ``hook_rot_k``; and whether a norm acts.

        A second row has the keys doubled; without a norm, the output is doubled too. ``following``
        observes the same pass.
        """
        n_pos = self.n_pos
        constant = self.random(1, 1, self.n_kv_heads, self.d_head)
        constant = constant.sign() * (0.5 + constant.abs())
        rows = torch.cat([constant, 2 * constant]).expand(-1, n_pos, -1, -1)
        found: dict[int, torch.Tensor] = {}

        def put(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            return rows.to(tensor.dtype).clone()

        def read(tensor: torch.Tensor, hook: Any, *, layer: int) -> None:
            found[layer] = tensor.double().cpu()

        hooks: list[Hook] = following.hooks()
        for layer in range(self.n_layers):
            hooks.append((f"blocks.{layer}.attn.hook_k", put))
            hooks.append((f"blocks.{layer}.attn.hook_rot_k", partial(read, layer=layer)))
        self.run(2, n_pos, hooks)
        keys = torch.stack([found[layer] for layer in range(self.n_layers)])
        norm = (keys[:, 1] - 2 * keys[:, 0]).abs().max() > 0.02 * keys[:, 0].abs().max()
        return keys[:, 0], bool(norm)


def pairing_residual(
    keys: Float[torch.Tensor, "layer pos kv_head d_head"], pairing: Pairing, rotary_dim: int
) -> float:
    """How far the norms of the declared pairs are from constant over positions (0: exact)."""
    partner = pair_partners(keys.shape[-1], rotary_dim, pairing)
    own = partner == torch.arange(keys.shape[-1])
    energy = keys.square() + torch.where(own, 0.0, keys[..., partner].square())
    change = (energy - energy[:, :1]).abs().amax((0, 1, 2))
    mean = energy.mean((0, 1, 2))
    alive = mean > DEAD * mean.max()
    return float((change / mean)[alive].max())


def find_pairing(
    keys: Float[torch.Tensor, "layer pos kv_head d_head"],
    declared: Pairing | None,
    name: str,
    tolerance: float,
    width: int | None = None,
) -> tuple[Pairing, int]:
    """The pairing and rotary width for which constant keys keep the norm of every pair.

    Args:
        keys: read at ``hook_rot_k`` while ``hook_k`` carried the same key at every position.
        declared: the pairing in the family's row, if there is one.
        name: the architecture, for messages.
        tolerance: the relative change of a pair's energy due to rounding.
        width: number of rotating dimensions from the model's own cosines, if known; it can't be
            measured on dead pairs.

    Raises:
        UnsupportedModelError: no pairing fits, or the one declared for this family does not.
    """
    d_head = keys.shape[-1]
    moved = ((keys - keys[:, :1]).abs().amax((0, 1, 2)) > 0).nonzero().flatten()
    if moved.numel() == 0:
        return "none", 0
    reach = min((int(moved.max()) + 2) // 2 * 2, d_head)
    candidates: list[tuple[Pairing, int]] = [("half", w) for w in range(2, d_head + 1, 2)]
    candidates.append(("adjacent", reach))
    if width is not None and reach <= width <= d_head:
        candidates = [("half", width), ("adjacent", width)]
    fits = [c for c in candidates if pairing_residual(keys, *c) < tolerance]
    # With a rotary width of 2, both pairings give the same pair.
    if declared is not None and not any(width == 2 for _, width in fits):
        fits = [c for c in fits if c[0] == declared]
    if not fits:
        raise UnsupportedModelError(
            f"{name}: no rotary pairing keeps the norm of its pairs"
            + (f" as the declared {declared!r} should" if declared else "")
        )
    return min(fits, key=lambda c: pairing_residual(keys, *c))


def pair_frequencies(
    keys: Float[torch.Tensor, "layer pos kv_head d_head"], pairing: Pairing, rotary_dim: int
) -> Float[torch.Tensor, "layer rotary_pair"]:
    """Radians per token of each pair, from the angles of constant keys over positions.

    Each pair is measured on the key head where its keys are largest. A pair that is dead in all
    heads of a layer gives zero.
    """
    if pairing == "half":
        a, b = keys[..., : rotary_dim // 2], keys[..., rotary_dim // 2 : rotary_dim]
    else:
        a, b = keys[..., 0:rotary_dim:2], keys[..., 1:rotary_dim:2]
    loudest = (a.square() + b.square())[:, :1].argmax(2, keepdim=True)
    a, b = (x.gather(2, loudest.expand(-1, x.shape[1], -1, -1))[:, :, 0] for x in (a, b))
    return angle_frequencies(torch.atan2(b, a))


def _architecture(model: Any) -> str:
    for key in ("architecture", "original_architecture"):
        value = getattr(model.cfg, key, None)
        if value:
            return str(value)
    return "unknown"


def _layout_hint(shape: tuple[int, ...], n_heads: int, d_head: int) -> str:
    if len(shape) == 4 and shape[2] == n_heads:
        return " (ungrouped keys: set ungroup_grouped_query_attention to False)"
    if len(shape) == 4 and shape[3] < d_head:
        return " (multi-head latent attention rotates only a slice of its keys)"
    return ""


def _refuse_refactored(model: Any, name: str) -> None:
    """Refuse TransformerLens' factored basis, where key dimensions are singular directions."""
    try:
        weight, bias = model.W_K.detach().float(), model.b_K.detach().float()
    except (AttributeError, NotImplementedError, ValueError, RuntimeError, TypeError):
        return  # TypeError: transformer-lens 3.9 stacks biases that are None
    if weight.ndim != 4 or bias.ndim != 3 or weight.is_meta:  # one on disk was never factored
        return
    extended = torch.cat([weight, bias.unsqueeze(2)], dim=2)
    gram = extended.transpose(-1, -2) @ extended
    diagonal = torch.diag_embed(torch.diagonal(gram, dim1=-2, dim2=-1))
    if float((gram - diagonal).norm() / diagonal.norm()) < 1e-3:
        raise UnsupportedModelError(
            f"{name}: its key weights are in the factored basis "
            "(refactor_factored_attn_matrices=True), where a key dimension is a singular "
            "direction, not one of the model's own; load it without that option"
        )
