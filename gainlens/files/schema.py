"""Schemas of file contents, composed of small checks.

A check takes a value and its name for the message, and raises ``Mismatch`` with one line. It
tests types, ranges and sizes. Relations between fields are checked by the class built from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from gainlens.errors import FileFormatError, InputError

Check = Callable[[Any, str], None]
MOST = 1 << 53
"""Maximum of any count in a file."""
MAX_LAYERS, MAX_HEADS, MAX_WIDTH = 4096, 65536, 65536
"""Maximum numbers of layers, heads, and dimensions per head of a model."""


class Mismatch(ValueError):
    """A value does not match its file's schema."""


@contextmanager
def checking(where: str, what: str) -> Iterator[None]:
    """Convert any error while building an object from a file's content to ``FileFormatError``.

    Args:
        where: the file.
        what: kind of content, for the message.
    """
    try:
        yield
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FileFormatError(f"{where} holds no {what}: {' '.join(reason.split())}") from None


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number from ``low`` to ``high``."""

    def check(value: Any, where: str) -> None:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or not low <= value <= high:
            raise Mismatch(f"{where} is {short(value)}, expected a number{_between(low, high)}")

    return check


def whole(low: int = 0, high: int = MOST) -> Check:
    """A whole number from ``low`` to ``high``."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Mismatch(
                f"{where} is {short(value)}, expected a whole number{_between(low, high)}"
            )

    return check


def text(*allowed: str) -> Check:
    """Text; one of ``allowed``, if any are given."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or (allowed and value not in allowed):
            expected = " or ".join(map(repr, allowed)) or "text"
            raise Mismatch(f"{where} is {short(value)}, expected {expected}")

    return check


def maybe(inner: Check) -> Check:
    """None, or a value that passes ``inner``."""
    return lambda value, where: None if value is None else inner(value, where)


def listing(inner: Check, least: int = 0, length: int | None = None) -> Check:
    """A list or tuple of values that pass ``inner``: at least ``least``, or exactly ``length``."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple):
            raise Mismatch(f"{where} is {short(value)}, expected a list")
        if len(value) < least or (length is not None and len(value) != length):
            expected = f"{least} or more" if length is None else str(length)
            raise Mismatch(f"{where} has {len(value)} entries, expected {expected}")
        for index, entry in enumerate(value):
            inner(entry, f"{where}[{index}]")

    return check


def record(**named: Check) -> Check:
    """An object with exactly these fields."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Mismatch(f"{where} is {short(value)}, expected an object")
        if odd := sorted(set(named) ^ set(value), key=str):
            what = "lacks" if odd[0] in named else "has an unknown field"
            raise Mismatch(f"{where} {what} {odd[0]!r}")
        for name, inner in named.items():
            inner(value[name], f"{where}.{name}")

    return check


def facts(value: Any, where: str) -> None:
    """An object with any plain values, for information only: nothing is computed from them."""
    if not isinstance(value, Mapping):
        raise Mismatch(f"{where} is {short(value)}, expected an object")


def check_fields(thing: Any, checks: Mapping[str, Check]) -> None:
    """Check the fields of a dataclass by name.

    Raises:
        InputError: a field is invalid; the message names the class and the field.
    """
    assert is_dataclass(thing)
    for field in fields(thing):
        if field.name in checks:
            try:
                checks[field.name](getattr(thing, field.name), field.name)
            except Mismatch as error:
                raise InputError(f"{type(thing).__name__}: {error}") from None


def check_tensor(
    tensor: torch.Tensor, where: str, dtype: torch.dtype, shape: Sequence[int | None]
) -> None:
    """Check a tensor's dtype and shape (None: any size), and that it is finite.

    Raises:
        Mismatch: a check failed; the message says which.
    """
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(
        a == b or b is None for a, b in zip(got, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise Mismatch(f"{where} is {tensor.dtype} {got}, expected {dtype} ({wanted})")
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise Mismatch(f"{where} holds NaN or infinity")


def check_names(
    tensors: Mapping[str, Any], needed: Sequence[str], where: str = "its tensors"
) -> None:
    """Raise ``Mismatch`` unless exactly these tensors are present."""
    if odd := sorted(set(tensors) ^ set(needed)):
        what = "lack" if odd[0] in needed else "have an unknown"
        raise Mismatch(f"{where} {what} {odd[0]!r}")


def short(value: Any) -> str:
    """A value for a message, truncated."""
    shown = repr(value) if not isinstance(value, list | dict | tuple) else type(value).__name__
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _between(low: float, high: float) -> str:
    if high in (math.inf, MOST):
        return "" if low == -math.inf else f" of at least {low:g}"
    return f" from {low:g} to {high:g}"
