"""The rotation of queries and keys: angles, scale and positions in one object.

The rotation is read from the model. Every attention layer receives the cosines and sines of the
current pass (or its position ids), and ``Following`` reads them when the layer starts. This covers
generation with a cache, left padding, scales on cos and sin (longrope, yarn) and frequencies that
depend on the length (longrope, dynamic NTK). If a model passes only position ids to its layers
(GPT-J), the frequencies measured on it are used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gainlens.brief import brief
from gainlens.errors import SilentSiteError, UnsupportedModelError
from gainlens.model.hooks import Hook
from gainlens.model.rotary_tables import Angles


@dataclass(frozen=True, eq=False)
class Turn:
    """The rotation of some dimensions of a head: ``x·cos + x[partner]·sin`` per position.

    Attributes:
        cos, sin: per dimension, including the sign of the sine and any scale; dimensions that do
            not rotate have cosine 1 and sine 0. ``[pos, dim]`` or ``[batch, pos, dim]``.
        partner: the dimension that each dimension rotates with.
    """

    cos: Float[torch.Tensor, "*batch pos dim"]
    sin: Float[torch.Tensor, "*batch pos dim"]
    partner: Int[torch.Tensor, " dim"]

    __repr__ = brief

    @classmethod
    def of_pairs(
        cls,
        cos: Float[torch.Tensor, "*batch pos pair"],
        sin: Float[torch.Tensor, "*batch pos pair"],
        partner: Int[torch.Tensor, " d_head"],
    ) -> Turn:
        """From one cosine and sine per rotary pair."""
        units = torch.arange(len(partner))
        lower = units[partner > units]
        upper = partner[lower]
        full_cos = torch.ones(*cos.shape[:-1], len(partner), dtype=torch.float32, device=cos.device)
        full_sin = torch.zeros_like(full_cos)
        full_cos[..., lower], full_cos[..., upper] = cos.float(), cos.float()
        full_sin[..., lower], full_sin[..., upper] = -sin.float(), sin.float()
        return cls(full_cos, full_sin, partner)

    @classmethod
    def of_frequencies(
        cls,
        frequencies: Float[torch.Tensor, "*each rotary_pair"],
        partner: Int[torch.Tensor, " d_head"],
        positions: Int[torch.Tensor, "*batch pos"],
    ) -> Turn:
        """From radians per token, with scale 1.

        Frequencies are ``[rotary_pair]``, or ``[kv_head, 1, rotary_pair]`` with positions
        ``[*batch, 1, pos]``.
        """
        places = positions.to("cpu", torch.float64)
        angle = places[..., None] * frequencies.to("cpu", torch.float64)
        return cls.of_pairs(angle.cos(), angle.sin(), partner)

    def __call__(
        self, x: Float[torch.Tensor, "*rest pos dim"], inverse: bool = False
    ) -> Float[torch.Tensor, "*rest pos dim"]:
        """Rotate and scale; undo both if ``inverse``."""
        if inverse:
            return self.adjoint(x) / self._square(x.device)
        cos, sin = self.cos.to(x.device), self.sin.to(x.device)
        turned: torch.Tensor = x * cos + x[..., self.partner.to(x.device)] * sin
        return turned

    def adjoint(
        self, x: Float[torch.Tensor, "*rest pos dim"]
    ) -> Float[torch.Tensor, "*rest pos dim"]:
        """The transpose: the inverse rotation, with the forward scale."""
        cos, sin = self.cos.to(x.device), self.sin.to(x.device)
        turned: torch.Tensor = x * cos - x[..., self.partner.to(x.device)] * sin
        return turned

    def of_product(
        self, x: Float[torch.Tensor, "*rest pos wide"], matrix: Float[torch.Tensor, "dim wide"]
    ) -> Float[torch.Tensor, "*rest pos dim"]:
        """``x @ matrix.T``, rotated. Partners are swapped in the matrix, not at every position."""
        turned: torch.Tensor = (x @ matrix[self.partner].T).mul_(self.sin)
        return turned.addcmul_(x @ matrix.T, self.cos)

    def product_gradient(
        self, x: Float[torch.Tensor, "*rest pos wide"], pull: Float[torch.Tensor, "*rest pos dim"]
    ) -> Float[torch.Tensor, "dim wide"]:
        """The gradient by the matrix of ``of_product`` that ``pull`` on its output gives."""
        flat = x.flatten(0, -2)
        still, swapped = ((pull * f).flatten(0, -2).mT @ flat for f in (self.cos, self.sin))
        found: torch.Tensor = still + swapped[self.partner]
        return found

    def heads(
        self, x: Float[torch.Tensor, "batch pos head dim"], inverse: bool = False
    ) -> Float[torch.Tensor, "batch pos head dim"]:
        """Rotate a tensor in the layout of hooks; computed in float32, returned in its dtype."""
        return self.by_head()(x.float().transpose(1, 2), inverse).transpose(1, 2).to(x.dtype)

    def gradient(
        self, x: Float[torch.Tensor, "batch pos head dim"]
    ) -> Float[torch.Tensor, "batch pos head dim"]:
        """Convert a gradient with respect to unrotated keys to one with respect to rotated keys."""
        one = self.by_head()
        return (one(x.float().transpose(1, 2)) / one._square(x.device)).transpose(1, 2).to(x.dtype)

    def alone(self) -> Turn:
        """The rotation of the first document, on the CPU; all documents must have the same."""
        cos, sin = (x if x.ndim == 2 else x[0] for x in (self.cos, self.sin))
        return Turn(cos.cpu(), sin.cpu(), self.partner)

    def at(self, positions: Int[torch.Tensor, "*some"]) -> Turn:
        """The rotation at some of the positions."""
        return Turn(self.cos[..., positions, :], self.sin[..., positions, :], self.partner)

    def of(self, dims: Int[torch.Tensor, " kept"]) -> Turn:
        """The rotation of a subset of dimensions made of whole pairs."""
        place = torch.zeros(len(self.partner), dtype=torch.long)
        place[dims] = torch.arange(len(dims))
        return Turn(self.cos[..., dims], self.sin[..., dims], place[self.partner[dims]])

    def by_head(self) -> Turn:
        """The same with room for heads before the positions, for ``[batch, head, pos, dim]``."""
        if self.cos.ndim == 2:
            return self
        return Turn(self.cos[:, None], self.sin[:, None], self.partner)

    def for_heads(self, n_heads: int) -> Turn:
        """Where key heads differ (``[*batch, kv_head, pos, dim]``), for the queries of each."""
        group = n_heads // self.cos.shape[-3]
        cos, sin = (x.repeat_interleave(group, -3) for x in (self.cos, self.sin))
        return Turn(cos, sin, self.partner)

    def sized(self, other: Turn) -> Turn:
        """The same angles with the size of another turn of the same dimensions."""
        size = other._square(self.cos.device).sqrt()
        return Turn(self.cos * size, self.sin * size, self.partner)

    def _square(self, device: torch.device) -> torch.Tensor:
        """The squared size of every dimension."""
        return self.cos.to(device).square() + self.sin.to(device).square()


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a model rotates its queries and keys.

    Attributes:
        frequencies: radians per token of each pair, measured on short text,
            ``[layer, rotary_pair]``; zero in a layer that does not rotate.
        partner: the dimension that each dimension rotates with.
        layout: which of the model's cosines belong to the pairs: ``halves`` (the first half),
            ``neighbours`` (every second), or None if the model's cosines can't be read and the
            measured frequencies are used.
        plain: whether the measured frequencies hold for every length.
        model: a weak reference to the model; its layers are read while they run.
        tables: for each layer, a function from a length to the model's cosines and sines.
    """

    frequencies: Float[torch.Tensor, "layer rotary_pair"]
    partner: Int[torch.Tensor, " d_head"]
    layout: Literal["halves", "neighbours"] | None = None
    plain: bool = True
    model: Callable[[], Any] = lambda: None
    tables: tuple[Callable[[int], Angles] | None, ...] = ()

    __repr__ = brief

    @classmethod
    def unknown(cls, model: Any, n_layers: int, d_head: int) -> Rotation:
        """A placeholder for a model not yet measured: it can be followed but has no frequencies."""
        frequencies = torch.full((n_layers, 1), torch.nan)
        return cls(frequencies, torch.arange(d_head), model=weakref.ref(model))

    @property
    def turns(self) -> bool:
        """Whether anything rotates."""
        return self.frequencies.numel() > 0

    def turn(self, layer: int, n_pos: int) -> Turn:
        """The rotation of a layer for a text of ``n_pos`` tokens, at positions 0, 1, …

        Raises:
            UnsupportedModelError: the rotation depends on the length in a way that can't be read.
        """
        if self.layout is not None and self._rotates(layer):
            table = self.tables[layer] if self.tables else None
            if table is not None:
                return self.from_angles(table(n_pos))
        return self.measured(layer, torch.arange(n_pos))

    def measured(self, layer: int, positions: Int[torch.Tensor, "*batch pos"]) -> Turn:
        """The rotation from the measured frequencies.

        Raises:
            UnsupportedModelError: the frequencies do not hold for every length.
        """
        if not self.plain and self._rotates(layer):
            raise UnsupportedModelError(
                "this model scales its rotary frequencies (rope_type other than 'default') and "
                "passes no cosines to its layers: its rotation can't be followed"
            )
        return Turn.of_frequencies(self.frequencies[layer], self.partner, positions)

    def from_angles(self, angles: Angles) -> Turn:
        """A ``Turn`` from cosines and sines as stored by the model."""
        cos, sin = (self._of_pairs(x) for x in angles)
        return Turn.of_pairs(cos, sin, self.partner)

    def follow(self) -> Following:
        """An object that reads the rotation from the model while it runs."""
        return Following(self)

    def _rotates(self, layer: int) -> bool:
        return bool((self.frequencies[layer] != 0).any())

    def _of_pairs(self, x: torch.Tensor) -> torch.Tensor:
        n = self.frequencies.shape[1]
        if x.shape[-1] == n:
            return x
        return x[..., :n] if self.layout == "halves" else x[..., 0 : 2 * n : 2]


@dataclass(eq=False)
class Following:
    """The rotation in a model's current forward pass.

    Attributes:
        rotation: the model's rotation.
        given: for each layer, the keyword arguments of its attention in the current pass.
    """

    rotation: Rotation
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    _waiting: dict[int, Any] = field(default_factory=dict, repr=False)
    _last: tuple[Any, Turn] | None = field(default=None, repr=False)

    def hooks(self) -> list[Hook]:
        """Hooks to attach before those that call ``turn``; empty if nothing rotates."""
        if not self.rotation.turns:
            return []
        return [
            (f"blocks.{layer}.hook_resid_pre", partial(self._layer_starts, layer=layer))
            for layer in range(len(self.rotation.frequencies))
        ]

    def turn(self, letter: str, layer: int, n_pos: int) -> Turn:
        """The rotation of the queries (``q``) or keys (``k``) that a layer is computing.

        Args:
            letter: ``q`` or ``k``.
            layer: index of the running layer.
            n_pos: number of positions in the tensor to rotate.

        Raises:
            SilentSiteError: the start of the layer was not observed.
            UnsupportedModelError: the model's positions can't be read.
        """
        rotation = self.rotation
        if not rotation.turns or not rotation._rotates(layer):
            flat = torch.zeros(n_pos, rotation.frequencies.shape[1])
            return Turn.of_pairs(flat + 1, flat, rotation.partner)
        call = self._call(layer)
        angles = call.get("position_embeddings")
        if rotation.layout is not None and isinstance(angles, tuple):
            if self._last is None or self._last[0] is not angles:
                self._last = (angles, rotation.from_angles((angles[0], angles[1])))
            return self._last[1]
        attention = self._attention(layer)
        places = self.positions(letter, layer, n_pos)
        if rotation.layout is not None and hasattr(attention, "rotary_cos"):
            places = places.to(attention.rotary_cos.device)
            tables = attention.rotary_cos[places], attention.rotary_sin[places]
            return rotation.from_angles(tables)
        return rotation.measured(layer, places)

    def positions(self, letter: str, layer: int, n_pos: int) -> Int[torch.Tensor, "*batch pos"]:
        """Where the queries or keys stand that a layer is computing; arguments as for ``turn``.

        Raises:
            SilentSiteError: the layer was not seen to start.
            UnsupportedModelError: the model hands its layers no positions, and they may not be
                0, 1, …
        """
        call = self._call(layer)
        if hasattr(self._attention(layer), "rotary_cos"):
            return _hooked_positions(call, letter, n_pos)
        positions = call.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.shape[-1] == n_pos:
            return positions
        _check_starts_at_zero(call)
        return torch.arange(n_pos)

    def _call(self, layer: int) -> dict[str, Any]:
        if layer not in self.given:
            raise SilentSiteError(
                f"the rotation of layer {layer} could not be read: its block was not run as a whole"
            )
        return self.given[layer]

    def _attention(self, layer: int) -> Any:
        model = self.rotation.model()
        return None if model is None else model.blocks[layer].attn

    def _layer_starts(self, x: torch.Tensor, hook: Any, *, layer: int) -> None:
        """Record the arguments of this layer's attention, once."""
        self.given.pop(layer, None)
        earlier = self._waiting.pop(layer, None)  # left over from an aborted pass
        if earlier is not None:
            earlier.remove()
        attention = self._attention(layer)
        if attention is None:
            return

        def caught(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._waiting.pop(layer).remove()
            self.given[layer] = kwargs

        self._waiting[layer] = attention.register_forward_pre_hook(caught, with_kwargs=True)


def _hooked_positions(call: dict[str, Any], letter: str, n_pos: int) -> torch.Tensor:
    """Positions in a HookedTransformer. It caches unrotated keys and rotates all in each pass."""
    entry = call.get("past_kv_cache_entry")
    total = n_pos
    if entry is not None and letter == "q":
        # The entry already includes the new keys, unless it is frozen.
        total = int(entry.past_keys.shape[1]) + (n_pos if entry.frozen else 0)
    mask = call.get("attention_mask")
    if mask is None:
        return torch.arange(total)[None, total - n_pos :]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found: torch.Tensor = places[:, -n_pos:]
    return found


def angle_frequencies(
    angle: Float[torch.Tensor, "layer pos rotary_pair"],
) -> Float[torch.Tensor, "layer rotary_pair"]:
    """Radians per token from angles at positions 0, 1, …

    The first step gives the number of full turns; the last position gives the precise value.
    """
    turn = angle - angle[:, :1]
    turn = torch.remainder(turn + torch.pi, 2 * torch.pi) - torch.pi
    last = angle.shape[1] - 1
    laps = ((turn[:, 1] * last - turn[:, last]) / (2 * torch.pi)).round()
    return ((turn[:, last] + 2 * torch.pi * laps) / last).abs()


def _check_starts_at_zero(call: dict[str, Any]) -> None:
    """Raise if there is a cache or padding, since positions may then not be 0, 1, …"""
    past = (v.get_seq_length() for v in call.values() if hasattr(v, "get_seq_length"))
    mask = call.get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all())
    if any(past) or padded:
        raise UnsupportedModelError(
            "this model passes no positions to its layers: with a cache or padding its rotation "
            "can't be followed; run whole documents without padding"
        )
