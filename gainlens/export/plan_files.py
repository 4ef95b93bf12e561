"""What the file of a plan may hold: checked before a plan is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gainlens.export.slot_rotation import expanded
from gainlens.files.schema import (
    MAX_LAYERS,
    MAX_WIDTH,
    Mismatch,
    facts,
    listing,
    maybe,
    number,
    record,
    text,
    whole,
)

KIND = "slice_plan"
MAX_UNITS = 1 << 28
"""Key dimensions of all heads of the largest model that a plan may be of."""
PLAN = record(
    fingerprint=maybe(text()),
    shape=listing(whole(1, MAX_WIDTH), length=3),
    basis=text("own", "canonical"),
    keep=listing(lambda *_: None),  # looked at once the shape is known
    value_widths=maybe(listing(whole(1, MAX_WIDTH))),
    facts=facts,
    frequencies=maybe(listing(listing(listing(number(0.0), least=1), least=1), least=1)),
)
"""What a plan's file holds, besides its seal."""

CUT_FILE = "cut_file"
"""Entry of the facts of a plan that is nothing without its maps: the file beside it that has them,
since a plan's own file can't hold them and no projection has taken them in."""


def without_cut_file(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a plan that no longer needs the maps in the file beside it."""
    return {name: value for name, value in facts.items() if name != CUT_FILE}


def plan_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``SlicePlan`` from its file's content, the seal taken off.

    Raises:
        Mismatch: another type, shape or range; something missing or unknown.
    """
    data = {"frequencies": None, **content}  # a plan whose pairs keep the model's own has none
    PLAN(data, "plan")
    shape, rows, widths = data["shape"], data["keep"], data["value_widths"]
    if shape[0] > MAX_LAYERS or math.prod(shape) > MAX_UNITS:
        raise Mismatch(f"shape is {shape}, larger than any model's")
    head = listing(whole(0, shape[2] - 1))
    listing(listing(head, length=shape[1]), length=shape[0])(rows, "keep")
    keep = torch.zeros(*shape, dtype=torch.bool)
    for layer, heads in enumerate(rows):
        for at, dims in enumerate(heads):
            if dims != sorted(set(dims)):
                raise Mismatch(f"keep[{layer}][{at}] is not in rising order")
            keep[layer, at, dims] = True
    return {
        "keep": keep,
        "value_widths": None if widths is None else tuple(widths),
        "basis": data["basis"],
        "fingerprint": data["fingerprint"],
        "facts": dict(data["facts"]),
        "frequencies": expanded(data["frequencies"]),
    }
