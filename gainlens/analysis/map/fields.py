"""Validation of the parts of a map, from their annotations and a table of ranges."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import AbstractArray, jaxtyped

from gainlens.files.schema import Mismatch, short

RANGES = {
    "cosine": (-1, 1),
    "centred_cosine": (-1, 1),
    "centred": (-1, 1),
    "spearman": (-1, 1),
    "overlap": (0, 1),
    "cv": (0, math.inf),
    "p_raw": (0, 1),
    "p_corrected": (0, 1),
    "p_mean": (0, 1),
    "p_values": (0, 1),
    "q_values": (0, 1),
    "matched_p": (0, 1),
    "profiles": (0, math.inf),
    "presence": (-math.inf, 1),
    "mass": (0, 1),
    "n_documents": (0, math.inf),
    "n_units": (1, math.inf),
    "n_tokens": (1, math.inf),
}
"""Allowed ranges by field name, for all parts."""
ROUNDING = 1e-6


def check_part(part: Any, where: str = "map") -> None:
    """Check a part of a map, and the parts inside it, field by field.

    Raises:
        Mismatch: a type or shape differs from the annotation, or a value is out of range.
    """
    hints = get_type_hints(type(part), include_extras=True)

    with jaxtyped("context"):  # an axis name has one size within a part
        for field in fields(part):
            place = f"{where}.{field.name}"
            value = getattr(part, field.name)
            if not _fits(value, hints[field.name]):
                raise Mismatch(
                    f"{place} is {_described(value)}, expected {_name(hints[field.name])}"
                )
            _check_range(value, field.name, place)
    for field in fields(part):
        _check_inside(getattr(part, field.name), f"{where}.{field.name}")


def _check_inside(value: Any, where: str) -> None:
    if is_dataclass(value):
        check_part(value, where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_inside(inner, f"{where}[{key!r}]")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in (None, NoneType):
        return value is None
    if origin is tuple:
        same = len(inner) == 2 and inner[1] is Ellipsis
        return isinstance(value, tuple) and (
            all(_fits(v, inner[0]) for v in value)
            if same
            else len(value) == len(inner) and all(map(_fits, value, inner))
        )
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_range(value: Any, name: str, where: str) -> None:
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_range(inner, name, f"{where}[{key!r}]")
    elif name in RANGES and isinstance(value, np.ndarray | float | int):
        array = np.asarray(value, dtype=np.float64)
        if not bool(((array >= low - ROUNDING) & (array <= high + ROUNDING)).all()):
            raise Mismatch(f"{where} contains values outside {low:g} to {high:g}, or NaN")


def _name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return f"{hint.__name__}"
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")


def _described(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else short(value)
