"""``Cut``: which key dimensions are removed, and what replaces them.

Each kind of cut is one file with one class. The class defines what is kept, how queries and keys
change in a running model, and what folds into the weights of a slim model. Downstream code takes
any ``Cut`` and never checks its kind.
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
from gainlens.brief import brief
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
    """Linear maps of projected queries and keys, per head; they fold into W_Q and W_K.

    Attributes:
        queries: ``query'[h] = queries[layer, h] @ query[h]``, before the rotation.
        keys: the same for key heads. Rows of cut dimensions are zero in both.
        facts: how the maps were made.
        frequencies: that each kept rotary pair turns by after the maps, float64 radians per token;
            None where pairs keep the model's own.
    """

    queries: Float[torch.Tensor, "layer head d_head d_head2"]
    keys: Float[torch.Tensor, "layer kv_head d_head d_head2"]
    facts: Mapping[str, Any]
    frequencies: Float[torch.Tensor, "layer kv_head rotary_pair"] | None = None

    __repr__ = brief


class Cut(Kept, ABC):
    """Which key dimensions are removed, and what replaces them.

    Attributes:
        kind: kind of the file that ``save`` writes; empty if the cut cannot be saved.
        facts: how the cut was made, as plain values for a file.

    Example:
        >>> gl.best_cut(model, calibration).save("cut.safetensors")
        >>> cut = gl.load_cut("cut.safetensors")
        >>> cut.kind, tuple(cut.keep.shape), round(cut.fraction_kept, 2)
    """

    kind: ClassVar[str] = ""
    facts: dict[str, Any]

    @property
    @abstractmethod
    def keep(self) -> Bool[torch.Tensor, "layer kv_head d_head"]:
        """True for what stays, on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that define the cut, by name, on the CPU."""

    @classmethod
    @abstractmethod
    def from_tensors(cls: type[C], tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> C:
        """Rebuild a cut from its ``tensors()`` and ``all_facts``.

        Args:
            tensors: every tensor by name, as ``tensors`` returns them.
            facts: the facts of the file.

        Raises:
            InputError, KeyError, TypeError: they do not describe a cut of this kind.
        """

    @classmethod
    def check_file(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Raise ``gainlens.files.schema.Mismatch`` unless the file has what this kind needs.

        Args:
            tensors: every tensor of the file, by name.
            facts: the facts of the file.
        """

    @abstractmethod
    def edit(self, model: Any, batch: Int[torch.Tensor, "document pos"]) -> Edit:
        """The cut as an edit of queries and keys after norms and rotation, for the fast copy.

        Args:
            model: the model to cut.
            batch: the text to run, at positions 0, 1, ….

        Raises:
            InputError: a cut of another model.
        """

    @abstractmethod
    def hooks(
        self, model: Any, batch: Int[torch.Tensor, "document pos"] | None = None
    ) -> AblationHooks:
        """The cut as forward hooks for ``run_with_hooks``.

        Args:
            model: the model to cut.
            batch: the text to run; needed if the replacement values depend on it.

        Raises:
            InputError: a cut of another model.
        """

    @abstractmethod
    def only(self, layer: int, kv_head: int | None = None) -> Cut:
        """The same cut in only one layer or key head; the rest stays intact.

        Args:
            layer: index of the layer.
            kv_head: index of the key head; all heads of the layer if None.
        """

    @property
    def maps(self) -> HeadMaps | None:
        """Maps that fold into the projections of a slim model; None for plain selection."""
        return None

    @property
    def all_facts(self) -> dict[str, Any]:
        """Facts about the cut and its sources, for files and plans."""
        return dict(self.facts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``."""
        n_layers, n_kv_heads, d_head = self.keep.shape
        return n_layers, n_kv_heads, d_head

    @property
    def fraction_kept(self) -> float:
        """Share of key dimensions that are kept, 0 to 1."""
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
        """The cut with other replacement values; see ``ablation_hooks``.

        Args:
            mode: name of the mode.
            stage: where the cut acts; the stage of the mode if None.
            gains: means and variances, for the modes that need them.
            cache: cached keys, for the modes that patch.
            donors: documents of the cache to take values from.
            seed: seed of the modes that draw at random.

        Raises:
            InputError: this kind of cut does not support the requested mode.
        """
        if mode != "zero" or stage not in (None, "rotated"):
            raise InputError(
                f"mode={mode!r}, stage={stage!r}: a {type(self).__name__} has its own "
                "replacement values; expected mode='zero' at stage='rotated'"
            )
        return self

    def check(self, sites: KeySites) -> None:
        """Raise ``InputError`` unless the cut fits the shape of the model with these sites."""
        if self.shape != sites.shape:
            raise InputError(
                f"cut has shape {self.shape}: this model ({sites.architecture}) has "
                f"[layer, kv_head, d_head] = {sites.shape}"
            )

    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything that defines the cut."""
        tensors = self.tensors()
        return tensor_digest(tensors[name] for name in sorted(tensors))

    def chosen_on(self) -> tuple[set[str], set[str]]:
        """Fingerprints of the texts and hashes of the documents used to choose or fit the cut."""
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
        """Write one safetensors file, readable by ``load`` and ``gainlens.load_cut``.

        Raises:
            InputError: this kind of cut cannot be saved, or the path is not writable.
        """
        if not self.kind:
            raise InputError(f"a {type(self).__name__} cannot be saved; save its mask instead")
        save_tensors(path, self.kind, self.tensors(), self.all_facts)

    @classmethod
    def load(cls: type[C], path: str | Path) -> C:
        """Read a file written by ``save``; executes no code.

        Raises:
            FileFormatError: the file is missing, truncated or of another kind.
        """
        tensors, facts = load_tensors(path, cls.kind)
        with checking(str(path), f"cut of kind {cls.kind!r}"):
            cls.check_file(tensors, facts)
            return cls.from_tensors(tensors, facts)


def check_cut(value: Any, name: str = "cut") -> Cut:
    """Return ``value`` if it is a cut.

    Args:
        value: the argument that the caller passed.
        name: name of the argument, for the error message.

    Raises:
        InputError: ``value`` is not a cut.
    """
    if not isinstance(value, Cut):
        raise InputError(
            f"{name}={type(value).__name__}: expected a cut (make one with KeyMask(keep) from a "
            "boolean array, or with gainlens.best_cut)"
        )
    return value
