"""``Cut``: what goes from a model's keys, and what stays in its place.

A kind of cut is one file: a class that says what is kept, how queries and keys change in a running
model, and what folds into the weights of a slim one. Everything downstream takes a ``Cut`` and asks
no kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.kept import Kept
from gainlens.data.document_identity import tensor_digest
from gainlens.errors import InputError
from gainlens.files import load_tensors, save_tensors
from gainlens.files.schema import checking
from gainlens.model.fast_copy import Edit
from gainlens.model.sites import KeySites

if TYPE_CHECKING:
    from gainlens.ablation.key_cache import KeyCache
    from gainlens.model.sites import Stage
    from gainlens.probes.gains import KeyGains


C = TypeVar("C", bound="Cut")


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """What a cut does to projected queries and keys, per head; it folds into W_Q and W_K.

    Attributes:
        queries: ``query'[h] = queries[layer, h] @ query[h]``, before the rotation.
        keys: the same for key heads; rows of cut dimensions are zero in both.
        facts: how the maps were made.
        frequencies: that each kept rotary pair turns by after the maps, float64 radians per token;
            None where pairs keep the model's own.
    """

    queries: Float[torch.Tensor, "layer head d_head d_head2"]
    keys: Float[torch.Tensor, "layer kv_head d_head d_head2"]
    facts: Mapping[str, Any]
    frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"] | None = None


class Cut(Kept, ABC):
    """What goes and what stays in its place.

    Attributes:
        kind: of the file that ``save`` writes; empty for a cut that has none.
        facts: how it was made, plain values for a file.
    """

    kind: ClassVar[str] = ""
    facts: dict[str, Any]

    @property
    @abstractmethod
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """True for what stays, on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that decides what the cut does, by name, on the CPU."""

    @classmethod
    @abstractmethod
    def from_tensors(cls: type[C], tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> C:
        """The cut of ``tensors()`` and ``all_facts``.

        Raises:
            InputError, KeyError, TypeError: they describe no cut of this kind.
        """

    @classmethod
    def check_file(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Raise ``gainlens.files.schema.Mismatch`` unless a file holds what this kind needs."""

    @abstractmethod
    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """The cut on queries and keys after every norm and rotation, for the fast copy.

        Args:
            model: to be cut.
            batch: the text that is run, at positions 0, 1, ….

        Raises:
            InputError: a cut of another model.
        """

    @abstractmethod
    def hooks(
        self, model: Any, batch: Int[torch.Tensor, "document pos"] | None = None
    ) -> AblationHooks:
        """The cut as forward hooks for ``run_with_hooks``.

        Args:
            model: to be cut.
            batch: the text that is run, where what is put in depends on it.

        Raises:
            InputError: a cut of another model.
        """

    @abstractmethod
    def only(self, layer: int, kv_head: int | None = None) -> Cut:
        """The same cut in one layer (or one of its key heads) alone; the rest stays intact."""

    @property
    def maps(self) -> HeadMaps | None:
        """What folds into the projections of a slim model; None for plain selection."""
        return None

    @property
    def all_facts(self) -> dict[str, Any]:
        """Facts of the cut and of what it was made from, for files and plans."""
        return dict(self.facts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``."""
        n_layers, n_kv_heads, d_head = self.keep.shape
        return n_layers, n_kv_heads, d_head

    @property
    def fraction_kept(self) -> float:
        """Share of key dimensions that stay, 0 to 1."""
        return int(self.keep.sum()) / self.keep.numel()

    def whole_pairs(self, partner: Int[torch.Tensor, " d_head"]) -> bool:
        """Whether no pair of a dimension and its ``partner`` (``KeySites.partner``) is split."""
        return bool((self.keep == self.keep[..., partner]).all())

    def in_mode(
        self,
        mode: str = "zero",
        *,
        stage: Stage | None = None,
        gains: KeyGains | None = None,
        cache: KeyCache | None = None,
        donors: Any = None,
        seed: int = 0,
    ) -> Cut:
        """The cut with something else in the place of what goes; see ``ablation_hooks``.

        Raises:
            InputError: this kind of cut has one mode, and another was asked for.
        """
        if mode != "zero" or stage not in (None, "rotated"):
            raise InputError(
                f"mode={mode!r}, stage={stage!r}: a {type(self).__name__} says itself what "
                "stands in for what it cuts; expected mode='zero' at stage='rotated'"
            )
        return self

    def check(self, sites: KeySites) -> None:
        """Raise ``InputError`` unless the cut has the shape of the model with these sites."""
        if self.shape != sites.shape:
            raise InputError(
                f"cut has shape {self.shape}: this model ({sites.architecture}) has "
                f"[layer, kv_head, d_head] = {sites.shape}"
            )

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that decides what the cut does."""
        tensors = self.tensors()
        return tensor_digest(tensors[name] for name in sorted(tensors))

    def chosen_on(self) -> tuple[set[str], set[str]]:
        """Fingerprints of the texts, and marks of the documents, that chose or fitted the cut."""
        texts: set[str] = set()
        documents: set[str] = set()
        waiting: list[Mapping[str, Any]] = [self.all_facts]
        while waiting:
            for name, value in waiting.pop().items():
                if isinstance(value, Mapping):
                    waiting.append(value)
                elif name in ("text", "texts"):
                    texts |= {value} if isinstance(value, str) else set(value)
                elif name == "documents" and isinstance(value, list | tuple):
                    documents |= set(value)
        return texts, documents

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which ``load`` and ``gainlens.load_cut`` read.

        Raises:
            InputError: a cut that has no file, or a path that can't be written.
        """
        if not self.kind:
            raise InputError(
                f"a {type(self).__name__} has no file of its own: save the mask that it cuts"
            )
        save_tensors(path, self.kind, self.tensors(), self.all_facts)

    @classmethod
    def load(cls: type[C], path: str | Path) -> C:
        """Read what ``save`` wrote; executes nothing.

        Raises:
            FileFormatError: missing, truncated, or of another kind.
        """
        tensors, facts = load_tensors(path, cls.kind)
        with checking(str(path), f"cut of kind {cls.kind!r}"):
            cls.check_file(tensors, facts)
            return cls.from_tensors(tensors, facts)


def check_cut(value: Any, name: str = "cut") -> Cut:
    """``value`` if it is a cut.

    Args:
        value: what a caller passed.
        name: of the argument, for the message.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, Cut):
        raise InputError(
            f"{name}={type(value).__name__}: expected a cut (KeyMask(keep) makes one of a boolean "
            "array, gainlens.best_cut the best one)"
        )
    return value
