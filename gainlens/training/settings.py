"""Training settings, checked before a run starts and compared before it resumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch

from gainlens.errors import InputError
from gainlens.training.find import check_train
from gainlens.training.objectives import get_objective
from gainlens.training.student import PRECISIONS

OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Settings:
    """Everything besides model, plan and text that determines the trained weights.

    Attributes are the arguments of ``gainlens.train_virtual_width``.

    Raises:
        InputError: a value outside its range.
    """

    steps: int
    objective: str = "divergence"
    train: tuple[str, ...] = ("q", "k")
    batch: int = 4
    lr: float = 1e-3
    other_lr: float | None = None
    frequency_lr: float | None = None
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = 1.0
    warmup: int = 10
    decay: str = "cosine"
    attention: float = 0.0
    precision: str = "float32"
    seed: int = 0
    check_every: int = 20
    stop_margin: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))
        check_train(self.train)
        get_objective(self.objective)
        for name, value, table in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("decay", self.decay, DECAYS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in table:
                raise InputError(f"{name}={value!r} is not one of {', '.join(table)}")
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("warmup", 0),
            ("check_every", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}: expected a whole number of at least {least}")
        for name in ("lr", "other_lr", "frequency_lr", "clip", "stop_margin"):
            value = getattr(self, name)
            if value is None and name != "lr":
                continue
            if not _is_number(value) or value <= 0:
                raise InputError(f"{name}={value!r}: expected a number above 0")
        for name in ("weight_decay", "momentum", "attention"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise InputError(f"{name}={value!r}: expected a number of 0 or above")
        betas = tuple(self.betas) if isinstance(self.betas, list | tuple) else ()
        if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise InputError(f"betas={self.betas!r}: expected two numbers from 0 to below 1")
        object.__setattr__(self, "betas", betas)

    def share_at(self, step: int) -> float:
        """Learning rate at ``step`` (from 0) as a share of the maximum."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = step / self.steps
        if self.decay == "cosine":
            return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        return warm * ((1 - done) if self.decay == "linear" else 1.0)

    def rate(self, group: str) -> float:
        """Maximum learning rate of a weight group.

        By default ``lr`` / 3 outside W_Q and W_K, and ``lr`` / 10 of the slots' frequencies, which
        act on every layer and the more the further apart two tokens are.
        """
        if group == "qk":
            return self.lr
        if group == "frequencies":
            return self.lr / 10 if self.frequency_lr is None else self.frequency_lr
        return self.lr / 3 if self.other_lr is None else self.other_lr

    def make_optimizer(self, groups: Sequence[tuple[str, list[torch.Tensor]]]) -> Any:
        """The optimiser over the active slices, one group per learning rate."""
        rows: list[dict[str, Any]] = [
            {"params": tensors, "lr": self.rate(name), "highest": self.rate(name)}
            for name, tensors in groups
            if tensors
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                rows, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(rows, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def to_json(self) -> dict[str, Any]:
        """Plain values; without a rate of frequencies where none is set, as runs had it before."""
        plain = {**asdict(self), "train": list(self.train), "betas": list(self.betas)}
        if self.frequency_lr is None:
            del plain["frequency_lr"]
        return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
