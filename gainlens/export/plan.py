"""``SlicePlan``: which key dimensions every key head of every layer keeps, physically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from gainlens.ablation.cut import Cut, HeadMaps, check_cut
from gainlens.ablation.kept import Kept
from gainlens.ablation.key_mask import KeyMask
from gainlens.errors import InputError
from gainlens.export.layout import HeadLayout, KeyPairs, head_layout, value_widths_of
from gainlens.export.plan_files import KIND, plan_fields
from gainlens.export.slot_rotation import check_frequencies, collapsed, frequency_table
from gainlens.files import opened, read_json, sealed, write_json
from gainlens.files.schema import checking

Basis = Literal["own", "canonical"]
BASES: tuple[Basis, ...] = ("own", "canonical")


@dataclass(frozen=True, eq=False)
class SlicePlan(Kept):
    """Which key dimensions stay: boolean ``[layer, kv_head, d_head]``, and how wide values become.

    A plan may be ragged: a layer's heads are padded to the widest with zero rows, which add
    nothing to a logit. Rotary pairs are kept or cut whole.

    Attributes:
        keep: True for what stays, on the CPU.
        value_widths: dimensions of a value head, per layer; None leaves values alone.
        basis: ``own`` if ``keep`` indexes the dimensions of the model, ``canonical`` if it indexes
            the singular directions of each head's query-key product, strongest first (only for
            models that do not rotate).
        fingerprint: hash of the model's weights (``gainlens.model.fingerprint``), or None for a
            plan made by hand. Without it ``slim`` checks only the shape.
        facts: how it was made (score, scope, fraction, …).
        maps: linear maps of the kept dimensions, from a refitted cut. ``slim`` and training fold
            them into the projections. A plan file cannot hold them: save the cut instead.
        frequencies: float64 radians per token of each kept rotary pair, ``[layer, kv_head, pair]``
            (an axis of length 1 serves all); None if pairs keep the frequencies of the model.

    Raises:
        InputError: a head keeps nothing, or a shape or value width is impossible.

    Example:
        >>> plan = gl.SlicePlan.from_mask(mask, values=0.5)
        >>> plan.value_widths
        (16, 16, 16, 16)
    """

    keep: Bool[torch.Tensor, "layer kv_head d_head"]
    value_widths: tuple[int, ...] | None = None
    basis: Basis = "own"
    fingerprint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    maps: HeadMaps | None = None
    frequencies: Float[torch.Tensor, "_ _ pair"] | None = None

    def __post_init__(self) -> None:
        keep = KeyMask(self.keep).keep
        empty = (~keep.any(-1)).nonzero()
        if len(empty):
            layer, head = (int(i) for i in empty[0])
            raise InputError(
                f"plan leaves key head {head} of layer {layer} no dimension: expected at least "
                "one (a rotary pair where keys rotate)"
            )
        if self.basis not in BASES:
            raise InputError(f"basis={self.basis!r} is not one of {', '.join(BASES)}")
        if self.value_widths is not None:
            widths = tuple(int(w) for w in self.value_widths)
            n_layers, _, d_head = keep.shape
            if len(widths) != n_layers or not all(1 <= w <= d_head for w in widths):
                raise InputError(
                    f"value_widths={widths}: expected {n_layers} widths (one per layer) between "
                    f"1 and {d_head}"
                )
            object.__setattr__(self, "value_widths", widths)
        object.__setattr__(self, "keep", keep)
        if self.frequencies is not None:
            found = check_frequencies(self.frequencies, self.shape)
            object.__setattr__(self, "frequencies", found)

    def __repr__(self) -> str:
        values = "" if self.value_widths is None else f", values {_span(self.value_widths)}"
        return f"SlicePlan({self.shape}, keeps {self.fraction_kept:.1%} of key dimensions{values})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SlicePlan)
            and torch.equal(self.keep, other.keep)
            and (self.value_widths, self.basis) == (other.value_widths, other.basis)
            and self.fingerprint == other.fingerprint
            and collapsed(self.frequencies) == collapsed(other.frequencies)
        )

    def __hash__(self) -> int:
        return hash((self.keep.numpy().tobytes(), self.value_widths, self.basis))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)`` of the model it cuts."""
        n_layers, n_kv_heads, d_head = self.keep.shape
        return n_layers, n_kv_heads, d_head

    @property
    def fraction_kept(self) -> float:
        """Share of key dimensions that stay, 0 to 1 (padding of ragged heads not counted)."""
        return float(self.keep.float().mean())

    @property
    def mask(self) -> KeyMask:
        """The same choice as a ``KeyMask``, for ablation."""
        return KeyMask(self.keep, self.facts)

    @property
    def shared(self) -> bool:
        """Whether all heads of all layers keep the same dimensions, at the same frequencies."""
        f = self.frequencies
        one_set = f is None or bool((f == f[:1, :1]).all())
        return one_set and bool((self.keep == self.keep[:1, :1]).all())

    def _rows(self) -> list[dict[str, Any]]:
        """As for a mask, with the width of the layer's value heads."""
        n_layers, _, d_head = self.shape
        widths = self.value_widths or (d_head,) * n_layers
        return [{**row, "value_width": widths[row["layer"]]} for row in super()._rows()]

    def layouts(self, rotary_dim: int | KeyPairs) -> list[HeadLayout]:
        """Where each kept dimension goes, one layout per layer.

        Args:
            rotary_dim: how many leading dimensions of a head rotate (half-split pairs); 0 for
                models that don't rotate and for plans in the canonical basis. ``KeyPairs`` for
                adjacent pairs, and where some layers don't rotate.

        Raises:
            InputError: half of a rotary pair is kept.
        """
        pairs = KeyPairs.of(rotary_dim)
        self.check_pairs(pairs)
        return [
            head_layout(keep.numpy(), pairs.width(layer), pairs.pairing)
            for layer, keep in enumerate(self.keep)
        ]

    def turning(
        self, rotary_dim: int | KeyPairs
    ) -> tuple[list[HeadLayout], Float[torch.Tensor, " column"] | None]:
        """The layouts with columns of a table of frequencies, and that table; None for the model's.

        ``rotary_dim`` and errors as for ``layouts``; slots need every dimension to rotate.
        """
        layouts = self.layouts(rotary_dim)
        if self.frequencies is None:
            return layouts, None
        wanted = KeyPairs.of(rotary_dim)
        if wanted.rotary_dim != self.shape[2]:
            raise InputError(f"plan has slots: {wanted.rotary_dim} dimensions rotate, expected all")
        if wanted.still:
            raise InputError(f"plan has slots: layer {min(wanted.still)} rotates nothing")
        pairs = [layout.frequency for layout in layouts if layout.frequency is not None]
        table, columns = frequency_table(self.frequencies, pairs)
        turned = zip(layouts, columns, strict=True)
        return [replace(x, frequency=c, natural=False) for x, c in turned], table

    def key_widths(self, rotary_dim: int | KeyPairs) -> tuple[int, ...]:
        """Physical width of a key head, per layer: the widest head's, even where keys rotate.

        ``rotary_dim`` and errors as for ``layouts``.
        """
        return tuple(layout.width for layout in self.layouts(rotary_dim))

    def cache_bytes_per_token(
        self, rotary_dim: int | KeyPairs, bytes_per_number: int = 4
    ) -> tuple[int, int]:
        """Bytes that one token takes in the key cache and in the value cache, all layers.

        Args:
            rotary_dim: as for ``layouts``.
            bytes_per_number: 4 for float32, 2 for half precision.
        """
        n_layers, n_kv_heads, d_head = self.shape
        values = self.value_widths or (d_head,) * n_layers
        per = n_kv_heads * bytes_per_number
        return sum(self.key_widths(rotary_dim)) * per, sum(values) * per

    def check_pairs(self, rotary_dim: int | KeyPairs) -> None:
        """Raise ``InputError`` if a plan keeps one dimension of a rotary pair without the other.

        ``rotary_dim`` is as for ``layouts``.
        """
        pairs = KeyPairs.of(rotary_dim)
        partner = pairs.partner(self.shape[2])
        halves = self.keep & ~self.keep[..., partner]
        halves[sorted(pairs.still)] = False
        split = halves.nonzero()
        if len(split):
            layer, head, dim = (int(i) for i in split[0])
            kept = int(self.keep[layer, head].sum())
            raise InputError(
                f"plan keeps {kept} dimensions of key head {head} of layer {layer}, among them "
                f"{dim} without {int(partner[dim])}, which rotates with it: expected whole rotary "
                "pairs (unit='pair')"
            )

    def check_model(self, shape: tuple[int, int, int], fingerprint: str, name: str) -> None:
        """Raise ``InputError`` unless the plan was made for this model.

        Args:
            shape: ``(n_layers, n_kv_heads, d_head)`` of the model.
            fingerprint: hash of its weights.
            name: name of the model in the error message.
        """
        if self.shape != shape:
            raise InputError(
                f"plan has shape {self.shape}: {name} has [layer, kv_head, d_head] = {shape}"
            )
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            raise InputError(
                f"plan was made for another model (weights {self.fingerprint[:12]}): this "
                f"{name} has weights {fingerprint[:12]}"
            )

    def with_values(self, widths: int | float | Sequence[int] | None) -> SlicePlan:
        """The same keys with value heads of ``widths``.

        Args:
            widths: dimensions (int), a share of them (float between 0 and 1), one width per
                layer, or None for full values.
        """
        return replace(self, value_widths=value_widths_of(widths, self.shape))

    @classmethod
    def from_cut(
        cls,
        cut: Cut,
        *,
        values: int | float | Sequence[int] | None = None,
        fingerprint: str | None = None,
    ) -> SlicePlan:
        """Make a plan from a cut; the facts carry over.

        Args:
            cut: a cut of any kind.
            values: as for ``with_values``.
            fingerprint: hash of the model's weights; by default from the facts of the cut.

        Raises:
            InputError: not a cut, or a head keeps nothing.

        Example:
            >>> plan = gl.SlicePlan.from_cut(gl.best_cut(model, tokens), values=0.5)
        """
        facts = check_cut(cut).all_facts
        return cls(
            cut.keep,
            value_widths_of(values, cut.shape),
            fingerprint=fingerprint or facts.get("fingerprint"),
            facts=facts,
            maps=cut.maps,
            frequencies=None if cut.maps is None else cut.maps.frequencies,
        )

    @classmethod
    def from_mask(
        cls,
        mask: Cut,
        *,
        values: int | float | Sequence[int] | None = None,
        fingerprint: str | None = None,
    ) -> SlicePlan:
        """Another name of ``from_cut``; arguments as there."""
        return cls.from_cut(mask, values=values, fingerprint=fingerprint)

    @classmethod
    def identity(cls, model: Any) -> SlicePlan:
        """The plan that cuts nothing of ``model`` (any of the three kinds)."""
        from gainlens.export.sources import open_source

        source = open_source(model)
        return cls(
            torch.ones(source.shape, dtype=torch.bool),
            fingerprint=source.fingerprint,
            facts={"order": "identity"},
        )

    def nearest_shared(self, rotary_dim: int | KeyPairs, width: int | None = None) -> SlicePlan:
        """The most similar plan with one set of dimensions for all heads.

        Args:
            rotary_dim: as for ``layouts``.
            width: key dimensions per head; by default the mean of this plan, rounded to whole
                pairs.
        """
        d_head = self.shape[2]
        partner = KeyPairs.of(rotary_dim).partner(d_head)
        votes = self.keep.float().mean((0, 1))
        votes = votes + votes[partner]
        wanted = max(2, 2 * round(self.fraction_kept * d_head / 2)) if width is None else width
        keep = torch.zeros(d_head, dtype=torch.bool)
        for dim in torch.argsort(votes, descending=True, stable=True).tolist():
            if int(keep.sum()) >= wanted:
                break
            keep[dim] = keep[partner[dim]] = True
        return replace(
            self,
            keep=keep.expand(self.shape).clone(),
            maps=None,
            frequencies=None,
            facts={**self.facts, "shared_from": "votes of the heads"},
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description; kept dimensions as lists of indices."""
        content = {
            "fingerprint": self.fingerprint,
            "shape": list(self.shape),
            "basis": self.basis,
            "keep": [[h.nonzero().flatten().tolist() for h in layer] for layer in self.keep],
            "value_widths": None if self.value_widths is None else list(self.value_widths),
            "facts": self.facts,
        }
        if self.frequencies is not None:
            content["frequencies"] = collapsed(self.frequencies)
        return sealed(KIND, content)

    @classmethod
    def from_json(cls, value: Any, where: str = "plan") -> SlicePlan:
        """Read ``value``, the output of ``to_json``; errors call it ``where``.

        Raises:
            FileFormatError: damaged, not a plan, of another version, or with impossible indices.
        """
        data = opened(value, KIND, where)
        with checking(where, "slice plan"):
            return cls(**plan_fields(data))

    def save(self, path: str | Path) -> None:
        """Write one JSON file.

        Raises:
            InputError: the plan has maps, which the file cannot hold.
        """
        if self.maps is not None:
            raise InputError("plan carries the maps of a cut: save the cut, not the plan")
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> SlicePlan:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: missing, damaged, or not a plan.
        """
        return cls.from_json(read_json(path), str(path))


def as_plan(value: Any) -> SlicePlan:
    """``value`` if it is a plan, or the plan that a cut becomes.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, SlicePlan):
        return value
    if not isinstance(value, Cut):
        raise InputError(
            f"plan={type(value).__name__}: expected a cut (KeyMask, gainlens.best_cut) or a "
            "SlicePlan (SlicePlan.from_cut makes one)"
        )
    return SlicePlan.from_cut(value)


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"
