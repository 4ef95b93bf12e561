"""``KeyGains``: mergeable sums over tokens, and the scores computed from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError
from gainlens.files import load_tensors, save_tensors
from gainlens.files.schema import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Mismatch,
    check_fields,
    check_tensor,
    checking,
    listing,
    record,
    text,
    whole,
)
from gainlens.frames import data_frame
from gainlens.model.families import Pairing
from gainlens.model.sites import STAGES, KeySites, Stage, pair_partners
from gainlens.plots.notebook import Display, Displayed
from gainlens.probes.scores import SCORES, get_score

Unit = str
UNITS = ("dim", "pair")
CARD = {
    "fingerprint": text(),
    "architecture": text(),
    "n_layers": whole(1, MAX_LAYERS),
    "n_heads": whole(1, MAX_HEADS),
    "n_kv_heads": whole(1, MAX_HEADS),
    "d_head": whole(1, MAX_WIDTH),
    "pairing": text(*get_args(Pairing)),
    "rotary_dim": whole(0, MAX_WIDTH),
}
"""Schema of a ``ModelCard``, also used in other kinds of files."""
GAINS = record(
    model=record(**CARD),
    n_tokens=whole(1),
    n_documents=whole(1),
    texts=listing(text(), least=1),
    documents=listing(text()),
)
ROUNDING = 1e-6
"""Relative tolerance for violations of the Cauchy-Schwarz inequality due to rounding."""


@dataclass(frozen=True)
class ModelCard:
    """Description of a model, stored with gains, masks and reports.

    Attributes:
        fingerprint: hash of the weights.
        architecture: Hugging Face architecture name.
        n_layers, n_heads, n_kv_heads, d_head: sizes.
        pairing, rotary_dim: which dimensions rotate together, and how many rotate.
    """

    fingerprint: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    pairing: Pairing
    rotary_dim: int

    def __post_init__(self) -> None:
        check_fields(self, CARD)
        rotates = self.pairing != "none"
        fits = self.rotary_dim <= self.d_head and self.rotary_dim % 2 == 0
        if self.n_heads % self.n_kv_heads or not fits or rotates != (self.rotary_dim > 0):
            raise InputError(
                f"ModelCard: inconsistent sizes: {self.n_heads} query and {self.n_kv_heads} "
                f"key heads of {self.d_head} dimensions, {self.rotary_dim} of them rotating, "
                f"pairing={self.pairing!r}"
            )

    @classmethod
    def of(cls, sites: KeySites, fingerprint: str) -> ModelCard:
        """The card of a probed model."""
        return cls(
            fingerprint=fingerprint,
            architecture=sites.architecture,
            n_layers=sites.n_layers,
            n_heads=sites.n_heads,
            n_kv_heads=sites.n_kv_heads,
            d_head=sites.d_head,
            pairing=sites.pairing,
            rotary_dim=sites.rotary_dim,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``."""
        return self.n_layers, self.n_kv_heads, self.d_head

    @property
    def partner(self) -> Int[torch.Tensor, " d_head"]:
        """The partner that each dimension rotates with (itself if it does not rotate)."""
        return pair_partners(self.d_head, self.rotary_dim, self.pairing)


@dataclass(frozen=True, eq=False)
class KeyGains(Displayed):
    """Sums of key and query statistics over tokens. Add two instances to merge their texts.

    Attributes:
        model: the model they were gathered on.
        sums: float64 ``[layer, kv_head, d_head]`` by name, e.g. ``"k_sq.rotated"``.
        n_tokens, n_documents: amount of text.
        texts: fingerprints of the texts, one per probe.
        frequencies: radians per token of each rotary pair, ``[layer, rotary_pair]``.
        documents: identities of the longer documents, if known; see ``gainlens.data.overlap``.

    Example:
        >>> gains.save("gains.safetensors")
        >>> both = gains + gl.KeyGains.load("gains.safetensors")
        >>> both.n_tokens == 2 * gains.n_tokens
        True
    """

    model: ModelCard
    sums: dict[str, torch.Tensor]
    n_tokens: int
    n_documents: int
    texts: tuple[str, ...]
    frequencies: Float[torch.Tensor, "layer rotary_pair"]
    documents: tuple[str, ...] = ()

    def __repr__(self) -> str:
        m = self.model
        return (
            f"KeyGains({m.architecture}, {m.n_layers} layers × {m.n_kv_heads} key heads × "
            f"{m.d_head} dims, {self.n_documents} documents, {self.n_tokens} tokens)"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``."""
        return self.model.shape

    def mean(self, stage: Stage = "rotated") -> Float[torch.Tensor, "layer kv_head d_head"]:
        """Mean key over tokens at ``stage``, float32, in the units of the activation."""
        return self._moment("k_sum", self._stage(stage)).float()

    def score(
        self, name: str, stage: Stage = "rotated", unit: Unit = "dim"
    ) -> Float[torch.Tensor, "layer kv_head d_head"]:
        """The gain of every key dimension, float32 ``[layer, kv_head, d_head]``.

        Args:
            name: a row of ``gainlens.probes.scores.SCORES``.
            stage: before (``projected``) or after (``rotated``) the rotation; without rotary
                embeddings both are the same.
            unit: ``dim``, or ``pair``, where both dimensions of a rotary pair get the pair's value.

        Raises:
            InputError: the name, stage or unit is unknown, or the statistics were not gathered.
        """
        score = get_score(name)
        if unit not in UNITS:
            raise InputError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
        at = self._stage(stage)
        moments = {
            key.rsplit(".", 1)[0]: self._moment(key.rsplit(".", 1)[0], at)
            for key in self.sums
            if key.endswith("." + at)
        }
        if "k_sum" in moments:
            moments["k_mean"] = moments["k_sum"]
            moments["k_var"] = moments["k_sq"] - moments["k_sum"].square()
        try:
            if unit == "pair" and score.compute_pair is not None:
                return score.compute_pair(moments, self.model.partner).float()
            if unit == "pair":
                partner = self.model.partner
                moments = {k: 0.5 * (v + v[..., partner]) for k, v in moments.items()}
            return score.compute(moments).float()
        except KeyError as missing:
            elsewhere = [s for s in STAGES if s != at and f"{missing.args[0]}.{s}" in self.sums]
            if elsewhere:
                raise InputError(
                    f"score={name!r} has no stage={stage!r}: expected stage={elsewhere[0]!r}, "
                    "where the logits are computed"
                ) from None
            raise InputError(
                f"score={name!r} needs statistics that these gains do not hold ({missing.args[0]}):"
                f" ask for it with probe_gains(..., scores=({name!r},))"
            ) from None

    def _stage(self, stage: Stage) -> Stage:
        if stage not in STAGES:
            raise InputError(f"stage={stage!r} is not one of {', '.join(STAGES)}")
        return stage if self.model.rotary_dim else "projected"

    def _moment(self, name: str, stage: Stage) -> torch.Tensor:
        key = f"{name}.{stage}"
        if key not in self.sums:
            raise InputError(f"these gains hold no {name!r} at stage={stage!r}")
        if name.startswith("fisher_"):
            return self.sums[key] / self.n_documents
        per_query = name.startswith(("q_", "logit_"))
        heads = self.model.n_heads // self.model.n_kv_heads if per_query else 1
        return self.sums[key] / (self.n_tokens * heads)

    def __add__(self, other: KeyGains) -> KeyGains:
        """Gains over both texts.

        Raises:
            InputError: the gains come from different models or hold different statistics.
        """
        if not isinstance(other, KeyGains):
            return NotImplemented
        check_same_model(self.model, other.model, "gains can't be merged")
        if set(self.sums) != set(other.sums):
            raise InputError(
                "gains can't be merged: they hold different statistics "
                f"({', '.join(sorted(set(self.sums) ^ set(other.sums)))} in one only)"
            )
        return replace(
            self,
            sums={name: value + other.sums[name] for name, value in self.sums.items()},
            n_tokens=self.n_tokens + other.n_tokens,
            n_documents=self.n_documents + other.n_documents,
            texts=self.texts + other.texts,
            documents=self.documents + other.documents,
        )

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that can be computed from the gathered statistics, after the rotation."""
        held = []
        for name in SCORES:
            try:
                self.score(name)
            except InputError:
                continue
            held.append(name)
        return tuple(held)

    def to_dataframe(self) -> Any:
        """One row per key dimension: layer, kv_head, dim, its rotary partner, and each score.

        The scores are those in ``scores``, after the rotation, in their own units.

        Raises:
            InputError: pandas is not installed.
        """
        values = {name: self.score(name).flatten().tolist() for name in self.scores}
        layers, heads, dims = (int(n) for n in self.shape)
        partner = self.model.partner.tolist()
        places = [(a, b, c) for a in range(layers) for b in range(heads) for c in range(dims)]
        return data_frame(
            {
                "layer": layer,
                "kv_head": head,
                "dim": dim,
                "partner": partner[dim],
                **{name: column[row] for name, column in values.items()},
            }
            for row, (layer, head, dim) in enumerate(places)
        )

    def plot(self, ax: Any = None, *, score: str | None = None) -> Any:
        """Heat map of gains, layers × dimensions; returns the matplotlib axes without showing them.

        Args:
            ax: axes to draw into; new ones by default.
            score: which gain; by default ``qk`` if it was gathered.

        Raises:
            InputError: the score is unknown, or its statistics were not gathered.
        """
        from gainlens.plots.basics import plot_gains

        return plot_gains(self, ax, score or self._shown_score)

    @property
    def _shown_score(self) -> str:
        held = self.scores
        return "qk" if "qk" in held or not held else held[0]

    def _display(self) -> Display:
        from gainlens.plots.markup.results import gains_map

        score = self._shown_score
        return Display(
            f"Heat map of the gain ({score}) of each key dimension by layer, relative "
            "to the mean of its head, on a logarithmic scale.",
            lambda alt: gains_map(self, score, alt),
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with sums as tensors and everything else as a JSON header."""
        facts = {
            "model": asdict(self.model),
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "texts": list(self.texts),
            "documents": list(self.documents),
        }
        save_tensors(path, "gains", {**self.sums, "frequencies": self.frequencies}, facts)

    @classmethod
    def load(cls, path: str | Path) -> KeyGains:
        """Read a file written by ``save``, without executing any code from it.

        Raises:
            FileFormatError: the file is missing, damaged, or not a gains file.
        """
        tensors, facts = load_tensors(path, "gains")
        with checking(str(path), "gains"):
            GAINS(facts, "facts")
            card = ModelCard(**facts["model"])
            frequencies = tensors.pop("frequencies")
            shape = (card.n_layers, card.rotary_dim // 2)
            check_tensor(frequencies, "frequencies", frequencies.dtype, shape)
            _check_sums(tensors, card, facts["n_tokens"])
            return cls(
                model=card,
                sums=tensors,
                n_tokens=facts["n_tokens"],
                n_documents=facts["n_documents"],
                texts=tuple(facts["texts"]),
                documents=tuple(facts["documents"]),
                frequencies=frequencies,
            )


def _check_sums(sums: dict[str, torch.Tensor], card: ModelCard, n_tokens: int) -> None:
    """Raise ``Mismatch`` if these can't be sums over tokens of the described model."""
    for name, value in sums.items():
        if name.rpartition(".")[2] not in STAGES:
            raise Mismatch(f"{name!r} names no known stage")
        check_tensor(value, name, torch.float64, card.shape)
        if "_sq." in name and bool((value < 0).any()):
            raise Mismatch(f"{name} holds negative sums of squares")
    for stage in STAGES:
        if f"k_sum.{stage}" in sums and f"k_sq.{stage}" in sums:
            square, most = sums[f"k_sum.{stage}"].square(), n_tokens * sums[f"k_sq.{stage}"]
            if bool((square > most * (1 + ROUNDING) + torch.finfo(torch.float64).tiny).any()):
                raise Mismatch(f"the keys at {stage} have means too large for their squares")


def check_same_model(a: ModelCard, b: ModelCard, what: str) -> None:
    """Raise unless two cards describe the same model."""
    if a.fingerprint != b.fingerprint:
        raise InputError(
            f"{what}: they belong to different models ({a.architecture} {a.shape}, weights "
            f"{a.fingerprint[:12]}; {b.architecture} {b.shape}, weights {b.fingerprint[:12]})"
        )


def check_same_weights(card: ModelCard, fingerprint: str) -> None:
    """Raise unless gains with this card belong to the model with this ``model_fingerprint``."""
    if fingerprint != card.fingerprint:
        raise InputError(
            f"gains were gathered on other weights ({card.architecture}, "
            f"{card.fingerprint[:12]}) than this model's ({fingerprint[:12]})"
        )
