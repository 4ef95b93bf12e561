"""The interface of an engine: how its checkpoints are checked, written and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan
from gainlens.export.streaming import MadeWeights
from gainlens.model.stored_weights import StoredWeights, is_offloaded


class EngineLimitError(InputError):
    """An engine cannot run a plan.

    Attributes:
        nearest: the most similar plan that the engine can run, or None if no plan would help.
    """

    def __init__(self, message: str, nearest: SlicePlan | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class Engine(ABC):
    """One row of ``ENGINES``.

    Attributes:
        name: its name in ``export_model`` and on the command line.
        precisions: formats of the weights, the default first.
        wide_values: whether value heads may be wider than key heads.
        streams: whether it writes a model whose weights are not in memory.
        reads_gguf: whether its vocabulary comes from a GGUF file instead of a tokenizer.
    """

    name: str
    wide_values: bool = True
    streams: bool = False
    reads_gguf: bool = False
    precisions: tuple[str, ...] = ("f32", "f16", "bf16")

    @abstractmethod
    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` if the engine cannot run the slim model.

        Uses only ``slim.config``, so a plan can be refused before a model is cut.
        """

    def notes(self, slim: Any) -> tuple[str, ...]:
        """Limits that still apply to a model that passed ``check``, one line each."""
        return ()

    def check_tokenizer(self, tokenizer: Any | None, n_tokens: int) -> None:
        """Raise ``InputError`` unless ``write`` accepts it; the model has ``n_tokens`` tokens."""
        if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
            raise InputError(
                f"tokenizer={tokenizer!r}: engine={self.name!r} expects a transformers tokenizer "
                "(or None)"
            )

    @abstractmethod
    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """Write the checkpoint into an empty folder."""

    def rounded(self, slim: Any, precision: str) -> Mapping[str, Float[torch.Tensor, "..."]]:
        """The state of a float32 slim model with its weights rounded as the engine rounds them.

        The written files are compared with this model, so the tolerance of the parity gate need not
        cover rounding.
        """
        fold = self.query_fold(slim)
        if is_offloaded(slim):
            held = StoredWeights(slim)

            def one(name: str) -> torch.Tensor:
                factor = fold if ".self_attn.q_proj." in name else 1.0
                return self.round(held[name] * factor, precision) / factor

            return MadeWeights(list(held), one)
        done: dict[int, torch.Tensor] = {}  # tied weights: one tensor with two names
        state = {}
        for name, tensor in slim.state_dict().items():
            if not tensor.is_floating_point():
                state[name] = tensor
                continue
            factor = fold if ".self_attn.q_proj." in name else 1.0
            if tensor.data_ptr() not in done:
                done[tensor.data_ptr()] = self.round(tensor * factor, precision) / factor
            state[name] = done[tensor.data_ptr()]
        return state

    def round(
        self, tensor: Float[torch.Tensor, "..."], precision: str
    ) -> Float[torch.Tensor, "..."]:
        """One float32 weight as it is read back."""
        return tensor.to(DTYPES[precision]).float()

    def query_fold(self, slim: Any) -> float:
        """Factor by which the written query projections are multiplied."""
        return 1.0

    @abstractmethod
    def read_back(self, folder: Path, device_map: Any = None) -> Any:
        """Load the written files as a float32 transformers model, independently of ``slim``.

        ``device_map`` is that of transformers, where the engine ``streams``.
        """

    def fault(self, folder: Path, model: Any, precision: str) -> str | None:
        """What is wrong with the files when the engine itself runs them, in one line.

        Args:
            folder: the written files.
            model: a transformers model of the same, rounded weights.
            precision: of the files.

        Returns:
            None if nothing is wrong, or where the engine is not installed.
        """
        return None

    def logits(
        self,
        folder: Path,
        batches: list[Int[torch.Tensor, "_ _"]],
        device_map: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Float[torch.Tensor, "_ _ _"]]:
        """Logits of the written files in ``dtype``; ``device_map`` as for ``read_back``."""
        model = (
            self.read_back(folder, device_map) if device_map else self.read_back(folder)
        ).eval()
        if dtype != torch.float32:
            model = model.to(dtype)
        with torch.no_grad():
            return [model(batch, use_cache=False).logits.to(dtype) for batch in batches]


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""The torch dtype of each precision."""
