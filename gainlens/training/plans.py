"""What training asks of a plan."""

from __future__ import annotations

import torch

from gainlens.data.document_identity import tensor_digest
from gainlens.errors import InputError
from gainlens.export.plan import SlicePlan


def check_plan(plan: SlicePlan) -> None:
    """Raise ``InputError`` for a plan that names no units of the model's own."""
    if plan.basis != "own":
        raise InputError(
            f"plan has basis {plan.basis!r}: virtual width trains the model's own units "
            "(basis='own')"
        )


def thin_values(plan: SlicePlan) -> bool:
    """Whether the plan cuts values."""
    return plan.value_widths is not None and set(plan.value_widths) != {plan.shape[2]}


def plan_digest(plan: SlicePlan) -> str:
    """A hash of what a plan keeps, of its slots' frequencies, and of the widths of its values."""
    slots = [] if plan.frequencies is None else [plan.frequencies]
    widths = [torch.tensor(plan.value_widths)] if thin_values(plan) else []
    return tensor_digest([plan.keep, *slots, *widths])
