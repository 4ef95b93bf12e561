"""What a writer for an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan


class EngineLimitError(InputError):
    """An engine can't run a plan.

    Attributes:
        nearest: the plan that it can run and that agrees with this one most, or None where no
            plan would help.
    """

    def __init__(self, message: str, nearest: SlicePlan | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class Engine(ABC):
    """One row of ``ENGINES``.

    Attributes:
        name: how ``export_model`` and the command line ask for it.
        precisions: what weights can be written as, the default first.
        tolerance: of the parity gate per precision. For ``f32`` the largest logit difference over
            the largest logit (or over 1 where that is smaller); for rounded weights the root mean
            square of the differences over that of the logits.
    """

    name: str
    precisions: tuple[str, ...] = ("f32", "f16", "bf16")
    tolerance: dict[str, float]

    @abstractmethod
    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` where the engine can't run the slim model as it is."""

    @abstractmethod
    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """Write the checkpoint into an empty folder."""

    @abstractmethod
    def read_back(self, folder: Path) -> Any:
        """The written files as a float32 transformers model that knows nothing of ``slim``."""

    def logits(
        self, folder: Path, batches: list[Int[torch.Tensor, "_ _"]]
    ) -> list[Float[torch.Tensor, "_ _ _"]]:
        """What the written files compute."""
        model = self.read_back(folder).eval()
        with torch.no_grad():
            return [model(batch, use_cache=False).logits.float() for batch in batches]


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Torch's name of a precision."""
