"""``KeyMask``: which key dimensions stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut
from gainlens.ablation.cut_files import check_mask_file
from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.masked_cut import MaskedCut
from gainlens.errors import InputError
from gainlens.model.fast_copy import Edit
from gainlens.model.sites import Stage
from gainlens.probes.gains import UNITS, KeyGains

Scope = Literal["head", "layer", "model", "universal"]
SCOPES: tuple[Scope, ...] = ("head", "layer", "model", "universal")
PROVENANCE = ("fingerprint", "texts", "documents")
"""Facts about the origin of a mask. They are hashes, so ``repr`` leaves them out."""


class KeyMask(Cut):
    """Which key dimensions stay: boolean ``[layer, kv_head, d_head]``, True for what stays.

    Attributes:
        keep: the mask, on the CPU.
        facts: how it was made (score, scope, unit, fraction, …); empty if made by hand.

    Raises:
        InputError: ``keep`` is not three-dimensional or not boolean (0 and 1 are accepted).

    Example:
        >>> mask = gl.KeyMask.quietest(gains, fraction=0.5, score="qk", scope="layer")
        >>> mask.fraction_kept
        0.5
        >>> by_hand = gl.KeyMask(gains.score("qk") > gains.score("qk").median())
    """

    kind = "mask"

    def __init__(self, keep: Any, facts: dict[str, Any] | None = None) -> None:
        try:
            keep = torch.as_tensor(keep).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"keep={type(keep).__name__} cannot be converted to an array: {error}"
            ) from None
        if keep.ndim != 3 or 0 in keep.shape:
            raise InputError(
                f"keep has shape {tuple(keep.shape)}: expected [layer, kv_head, d_head]"
            )
        if keep.dtype != torch.bool:
            if not bool(((keep == 0) | (keep == 1)).all()):
                raise InputError("keep contains values other than 0 and 1; expected booleans")
            keep = keep.bool()
        self._keep: Bool[torch.Tensor, "layer kv_head d_head"] = keep.clone()
        self.facts = dict(facts or {})

    def __repr__(self) -> str:
        made = ", ".join(f"{k}={v}" for k, v in self.facts.items() if k not in PROVENANCE)
        return (
            f"KeyMask({tuple(self.keep.shape)}, keeps {self.fraction_kept:.1%}"
            f"{', ' + made if made else ''})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyMask) and torch.equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash(self.keep.numpy().tobytes())

    @property
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """True for what stays."""
        return self._keep

    def tensors(self) -> dict[str, torch.Tensor]:
        """The mask itself."""
        return {"keep": self.keep}

    @classmethod
    def check_file(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """See ``Cut.check_file``."""
        check_mask_file(tensors, facts)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> KeyMask:
        """See ``Cut.from_tensors``."""
        return cls(tensors["keep"], facts)

    def in_mode(
        self,
        mode: str = "zero",
        *,
        stage: Stage | None = None,
        gains: KeyGains | None = None,
        cache: KeyCache | None = None,
        donors: Sequence[Int[torch.Tensor, "_document _pos"]] | None = None,
        seed: int = 0,
    ) -> MaskedCut:
        """The mask with replacement values other than zero; see ``MaskedCut``."""
        return MaskedCut(
            self, mode, stage=stage, gains=gains, cache=cache, donors=donors, seed=seed
        )

    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """See ``Cut.edit``; cut dimensions are zero."""
        return self.in_mode().edit(model, batch)

    def hooks(
        self, model: Any, batch: Int[torch.Tensor, "document pos"] | None = None
    ) -> AblationHooks:
        """See ``Cut.hooks``; cut dimensions are zero."""
        return self.in_mode().hooks(model, batch)

    def only(self, layer: int, kv_head: int | None = None) -> KeyMask:
        """The same mask in only one layer or one of its key heads."""
        keep = torch.ones_like(self.keep)
        heads = slice(None) if kv_head is None else kv_head
        keep[layer, heads] = self.keep[layer, heads]
        return KeyMask(keep, self.facts)

    @classmethod
    def quietest(
        cls,
        gains: KeyGains,
        fraction: float,
        score: str = "qk",
        scope: Scope = "head",
        unit: str = "pair",
        stage: Stage = "rotated",
    ) -> KeyMask:
        """Cut the quietest ``fraction`` of the units.

        Args:
            gains: from ``probe_gains``.
            fraction: share of dimensions to cut, 0 to 1, within each group of the scope; rounded
                to the nearest whole number of units.
            score: which gain ranks the units.
            scope: over which group the fraction is taken: each ``head``, each ``layer``, the whole
                ``model``, or one ``universal`` index set for all heads (ranked by the mean over
                heads of each unit's share of its head's gain).
            unit: ``pair`` cuts whole rotary pairs, ``dim`` single dimensions.
            stage: which gains to use, ``projected`` or ``rotated``.

        Raises:
            InputError: a fraction outside 0..1, an unknown score, scope, unit or stage.
        """
        return cls._ranked("quietest", gains, fraction, score, scope, unit, stage)

    @classmethod
    def loudest(
        cls,
        gains: KeyGains,
        fraction: float,
        score: str = "qk",
        scope: Scope = "head",
        unit: str = "pair",
        stage: Stage = "rotated",
    ) -> KeyMask:
        """Cut the loudest ``fraction``, as a control. Arguments as for ``quietest``."""
        return cls._ranked("loudest", gains, fraction, score, scope, unit, stage)

    @classmethod
    def _ranked(
        cls,
        order: str,
        gains: KeyGains,
        fraction: float,
        score: str,
        scope: Scope,
        unit: str,
        stage: Stage,
    ) -> KeyMask:
        values = gains.score(score, stage=stage, unit=unit)
        partner = gains.model.partner
        keep = keep_by_order(values, fraction, scope, unit, partner, loudest=order == "loudest")
        return cls(
            keep, {"order": order, "score": score, "scope": scope, "unit": unit,
                   "stage": stage, "fraction": fraction, **_origin(gains)},
        )  # fmt: skip

    @classmethod
    def random(
        cls,
        like: KeyGains,
        fraction: float,
        seed: int = 0,
        scope: Scope = "head",
        unit: str = "pair",
    ) -> KeyMask:
        """Cut units at random, as a control.

        Args:
            like: gains of the model, for its shape and pairs.
            fraction, scope, unit: as for ``quietest``.
            seed: seed of the generator. The result is the same on every machine.
        """
        noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
        if scope == "universal":
            noise = noise[:1, :1].expand(like.shape)
        if unit == "pair":
            noise = noise[..., torch.minimum(like.model.partner, torch.arange(like.shape[-1]))]
        keep = keep_by_order(noise, fraction, scope, unit, like.model.partner, shared=True)
        return cls(
            keep,
            {"order": "random", "scope": scope, "unit": unit, "fraction": fraction, "seed": seed,
             "fingerprint": like.model.fingerprint},
        )  # fmt: skip

    @classmethod
    def matched(
        cls,
        gains: KeyGains,
        fraction: float,
        score: str = "qk",
        scope: Scope = "head",
        unit: str = "pair",
        seed: int = 0,
    ) -> KeyMask:
        """Apply every head's quietest cut to another head: a random control matched in frequency.

        The number of units cut at each frequency equals that of ``quietest``, so a remaining
        advantage comes from the choice of units within a frequency. Arguments as for ``quietest``.

        Raises:
            InputError: scope ``universal``, where all heads share one cut, or a model with only one
                key head.
        """
        if scope == "universal":
            raise InputError(
                "scope='universal' has no frequency-matched control: all heads share one cut"
            )
        keep = cls.quietest(gains, fraction, score, scope, unit).keep
        heads = keep.flatten(0, 1)
        if len(heads) < 2:
            raise InputError(
                "gains have only one key head: a frequency-matched control uses the cut of "
                "another head, so it needs two or more"
            )
        order = torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed))
        # In the cycle ``order`` each head gets the cut of the previous one, so none keeps its own.
        moved = torch.empty_like(heads)
        moved[order] = heads[order.roll(1)]
        return cls(
            moved.reshape(keep.shape),
            {"order": "matched", "score": score, "scope": scope, "unit": unit,
             "fraction": fraction, "seed": seed, **_origin(gains)},
        )  # fmt: skip

    @classmethod
    def split(
        cls, gains: KeyGains, fraction: float, score: str = "qk", scope: Scope = "head"
    ) -> KeyMask:
        """Cut one dimension in each of the quietest pairs, until the fraction is reached.

        This is the negative control for whole pairs: half a pair no longer rotates with position.
        If one dimension of every pair is not enough, the second ones follow in the same order.
        Arguments as for ``quietest``.
        """
        values = gains.score(score, unit="pair").double()
        second = gains.model.partner < torch.arange(gains.shape[-1])
        shared = scope == "universal"
        if shared:
            values = share(values)
        values = values + second * (values.max() - values.min() + 1.0)
        keep = keep_by_order(values, fraction, scope, "dim", gains.model.partner, shared=shared)
        return cls(
            keep,
            {"order": "split", "score": score, "scope": scope, "unit": "dim",
             "fraction": fraction, **_origin(gains)},
        )  # fmt: skip


def _origin(gains: KeyGains) -> dict[str, Any]:
    """Origin of the gains: a plan from the mask fits only that model, and needs other test text."""
    return {
        "fingerprint": gains.model.fingerprint,
        "texts": list(gains.texts),
        "documents": list(gains.documents),
    }


def share(values: torch.Tensor) -> torch.Tensor:
    """Each unit's share of the sum over its head, so that loud heads do not dominate."""
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def check_fraction(fraction: Any) -> None:
    """Raise ``InputError`` unless ``fraction`` is a number from 0 to 1."""
    number = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if not number or not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction!r} is outside 0..1")


def check_something_stays(mask: KeyMask, fraction: float) -> None:
    """Raise ``InputError`` if ``fraction``, rounded to whole units, cuts everything."""
    if not bool(mask.keep.any()):
        raise InputError(
            f"fraction={fraction!r} cuts everything: rounded to whole units, it leaves none "
            f"of the {mask.shape[-1]} dimensions of a head; expected a smaller fraction"
        )


def keep_by_order(
    values: Float[torch.Tensor, "layer kv_head d_head"],
    fraction: float,
    scope: Scope,
    unit: str,
    partner: Int[torch.Tensor, " d_head"],
    *,
    shared: bool = False,
    loudest: bool = False,
) -> Bool[torch.Tensor, "layer kv_head d_head"]:
    """Cut the units with the smallest values; ties are broken by index.

    Args:
        values: the ranking; equal on both dimensions of a pair if ``unit`` is ``pair``.
        fraction, scope, unit: as for ``KeyMask.quietest``. If the fraction is below 1, the
            scopes ``layer`` and ``model`` always leave every head its last unit.
        partner: the dimension that each dimension rotates with.
        shared: ``values`` are already comparable between heads (universal scope).
        loudest: cut the units with the largest values instead.

    Raises:
        InputError: a fraction outside 0..1, NaN in the values, an unknown scope or unit.
    """
    check_fraction(fraction)
    if scope not in SCOPES:
        raise InputError(f"scope={scope!r} is not one of {', '.join(SCOPES)}")
    if unit not in UNITS:
        raise InputError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if not bool(torch.isfinite(values).all()):
        raise InputError("scores contain NaN or infinity, so they cannot be ranked")
    layers, heads, d_head = values.shape
    first = torch.arange(d_head)
    if unit == "pair":
        first = first[first <= partner]
    units = values[..., first].double()
    size = torch.where(partner[first] != first, 2, 1) if unit == "pair" else torch.ones_like(first)
    if scope == "universal":
        merged = units if shared else share(units)
        flat = merged.mean((0, 1))[None]
    elif scope == "head":
        flat = units.flatten(0, 1)
    elif scope == "layer":
        flat = units.flatten(1)
    else:
        flat = units.reshape(1, -1)
    sizes = size.repeat(flat.shape[1] // len(size))
    order = -flat if loudest else flat
    spared = torch.zeros_like(flat, dtype=torch.bool)
    if scope in ("layer", "model") and fraction < 1:
        best = order.reshape(layers * heads, -1).argmax(1, keepdim=True)
        by_head = spared.reshape(layers * heads, -1)
        spared = by_head.scatter(1, best, True).reshape(flat.shape)
    cut = _smallest(order.masked_fill(spared, torch.inf), sizes, fraction) & ~spared
    if scope == "universal":
        chosen = cut.expand(layers * heads, -1).reshape(layers, heads, -1)
    else:
        chosen = cut.reshape(layers, heads, -1)
    keep = torch.ones(values.shape, dtype=torch.bool)
    keep[..., first] = ~chosen
    if unit == "pair":
        keep &= keep[..., partner]
    return keep


def _smallest(
    flat: Float[torch.Tensor, "group unit"], sizes: Int[torch.Tensor, " unit"], fraction: float
) -> Bool[torch.Tensor, "group unit"]:
    """Mark the smallest units of each row, up to the share of dimensions nearest ``fraction``."""
    order = torch.argsort(flat, dim=1, stable=True)
    ends = sizes[order].cumsum(1)
    target = fraction * int(sizes.sum())
    # Cut a unit only if that brings the number of cut dimensions nearer to the target.
    taken = (ends - sizes[order] / 2) < target
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, taken)
