"""The common interface of the three kinds of model for ``slim``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int, Shaped

from gainlens.errors import UnsupportedModelError
from gainlens.export.building import without_weights
from gainlens.export.families import FAMILIES, SlimFamily
from gainlens.export.slot_rotation import usual_frequencies
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.families import Pairing
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.running import model_device
from gainlens.model.stored_weights import StoredWeights

KeyMap = Float[torch.Tensor, "layer kv_head d_head d_head"]
"""What a key is multiplied by from the right, per head: a diagonal of 0 and 1, or a projection."""
QueryMap = Float[torch.Tensor, "layer head d_head d_head"]
"""The same for queries."""
ValueMap = Float[torch.Tensor, "layer kv_head d_value d_value"]
"""The same for attention outputs before the output projection."""
Flows = Float[torch.Tensor, "layer kv_head d_value d_value"]
"""Second moment of the attention output, mean over tokens and query heads."""


@dataclass(frozen=True, eq=False)
class ProjectionMaps:
    """A plan as linear maps of projected queries and keys; float64, CPU.

    Attributes:
        keys: per key head.
        queries: per query head, or None if queries do not change.
        turns: added to the frequencies of the pairs after the maps, in radians per
            token, or None.
        pairing: how the dimensions of the pairs lie.
    """

    keys: KeyMap
    queries: QueryMap | None = None
    turns: Float[torch.Tensor, "layer kv_head pair"] | None = None
    pairing: Pairing = "half"

    def turn(self, layer: int) -> Float[torch.Tensor, "kv_head pair"] | None:
        """``turns`` of one layer."""
        return None if self.turns is None else self.turns[layer]


class Source(ABC):
    """Read access to a model that will be made slim; the model is not changed.

    Attributes:
        model: the object that was passed.
        config: the Hugging Face configuration.
        architecture: the Hugging Face architecture name.
        family: its row.
    """

    def __init__(self, model: Any, config: Any, architecture: str) -> None:
        self.model, self.config, self.architecture = model, config, architecture
        family = FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedModelError(
                f"{architecture} can't be made slim: known are {', '.join(FAMILIES)}"
            )
        reason = family.refuse(config)
        if reason is None:
            reason = next((why for p in model.parameters() if (why := _no_numbers(p))), None)
        if reason is None and StoredWeights(getattr(model, "original_model", model)).lost:
            reason = "its weights are not in memory (device meta): load it with them"
        if reason is not None:
            raise UnsupportedModelError(f"{architecture} can't be made slim: {reason}")
        self.family: SlimFamily = family

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n_layers, n_kv_heads, d_head)``."""
        family, config = self.family, self.config
        return self.n_layers, family.n_kv_heads(config), family.d_head(config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, the same for the three kinds."""
        return model_fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return model_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        first: torch.Tensor = next(self.model.parameters())
        return first.dtype

    def rotary_frequencies(self) -> Float[torch.Tensor, "layer rotary_pair"]:
        """Radians per token of each rotary pair, by the family's own code; float64."""
        if self.family.angles == "positions":
            own = usual_frequencies(self.family.rotary_dim(self.config))
            return own.expand(self.n_layers, -1)
        whole = without_weights(lambda: getattr(transformers, self.family.model_class)(self.config))
        rotary = whole.base_model.rotary_emb
        kinds = getattr(self.config, "layer_types", None) or [""] * self.n_layers
        # Where layers of different kinds rotate differently, each kind has a table of its own.
        rows = [
            getattr(rotary, f"{kind}_inv_freq", None) if kind else None
            for kind in kinds[: self.n_layers]
        ]
        return torch.stack([rotary.inv_freq if row is None else row for row in rows]).double().cpu()

    @abstractmethod
    def attention(self, layer: int) -> AttentionWeights:
        """One layer's attention; the tensors may be the model's own and are never written."""

    @abstractmethod
    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """The other parameters by Hugging Face name; tensors may be the model's own."""

    @abstractmethod
    def logits(
        self,
        tokens: Int[torch.Tensor, "document pos"],
        cut: ProjectionMaps | None = None,
        values: ValueMap | None = None,
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Logits of the original after the cut, float32 or wider, with mapped attention outputs."""

    @abstractmethod
    def flows(self, batches: list[Int[torch.Tensor, "_ _"]], cut: ProjectionMaps | None) -> Flows:
        """Second moments at the output projection's input over the text, float64 on the CPU."""


def _no_numbers(parameter: Shaped[torch.Tensor, "..."]) -> str | None:
    """Reason why a weight cannot be cut, or None."""
    if not parameter.is_floating_point():
        return f"its weights are quantised ({parameter.dtype}): load it in a floating point type"
    return None
