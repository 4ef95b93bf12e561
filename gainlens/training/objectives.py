"""Training objectives. A new objective is one row of ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError
from gainlens.training.student import QueriesKeys

Loss = Callable[[torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """One row.

    Attributes:
        name: its name in ``objective=``.
        teacher: whether it needs the logits of the intact model.
        loss: function of the student's logits ``[row, vocab]``, the teacher's logits and the next
            tokens ``[row]``; returns the sum over rows in nats.
    """

    name: str
    teacher: bool
    loss: Loss


def divergence(
    student: Float[torch.Tensor, "row vocab"],
    teacher: Float[torch.Tensor, "row vocab"] | None,
    targets: Int[torch.Tensor, " row"],
) -> Float[torch.Tensor, ""]:
    """Kullback-Leibler divergence from the intact model's next-token distribution, nats.

    Knowledge distillation at temperature 1 (Hinton, Vinyals and Dean, 2015).
    """
    assert teacher is not None
    found: torch.Tensor = _Divergence.apply(student, teacher)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """Divergence and gradient in one go: the difference of two distributions, few temporaries."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        wanted, got = teacher.log_softmax(-1), student.log_softmax(-1)
        chance = wanted.exp()
        total = wanted.sub_(got).mul_(chance).sum()
        ctx.save_for_backward(got.exp_().sub_(chance))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grad, None


def next_token(
    student: Float[torch.Tensor, "row vocab"],
    teacher: Float[torch.Tensor, "row vocab"] | None,
    targets: Int[torch.Tensor, " row"],
) -> Float[torch.Tensor, ""]:
    """Cross entropy of the text's next token, nats."""
    return torch.nn.functional.cross_entropy(student, targets, reduction="sum")


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("divergence", True, divergence),
        Objective("next_token", False, next_token),
    )
}


def get_objective(name: str) -> Objective:
    """The row called ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective={name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def attention_divergence(
    student: QueriesKeys,
    teacher: QueriesKeys,
    scales: Sequence[float],
    windows: Sequence[int | None] | None = None,
) -> Float[torch.Tensor, ""]:
    """Divergence of the attention from the intact model's: mean over layers, heads, queries.

    Computed from queries and keys under a causal mask; each layer is recomputed in the backward
    pass, so that only one layer's attention is held at a time.

    Args:
        student, teacher: queries and keys of every layer.
        scales: what a layer's query-key products are multiplied by.
        windows: how many positions, its own among them, a layer's query sees; None for all before
            it.
    """
    from torch.utils.checkpoint import checkpoint

    total = student[0][0].new_zeros((), dtype=torch.float32)
    seen: Sequence[int | None] = [None] * len(scales) if windows is None else windows
    for (q, k), (wanted_q, wanted_k), scale, window in zip(
        student, teacher, scales, seen, strict=True
    ):
        found = checkpoint(
            _layer_divergence, q, k, wanted_q, wanted_k, scale, window, use_reentrant=False
        )
        total = total + found
    return total / len(student)


def _layer_divergence(
    q: torch.Tensor,
    k: torch.Tensor,
    wanted_q: torch.Tensor,
    wanted_k: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    wanted = _log_attention(wanted_q, wanted_k, scale, window)
    got = _log_attention(q, k, scale, window)
    # Positions out of sight weigh exactly nothing; their -inf - -inf must not turn into NaN.
    difference = (wanted - got).masked_fill(wanted == -torch.inf, 0.0)
    return (wanted.exp() * difference).sum(-1).mean()


def _log_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).transpose(1, 2), k.to(wide).transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = scale * q @ k.transpose(-1, -2)
    sight = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if window is not None:
        sight = sight.triu(1 - window)
    return logits.masked_fill(~sight, -torch.inf).log_softmax(-1)
