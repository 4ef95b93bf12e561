"""A result in one line that fits a screen: arrays by their shape, long lists by their length."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

LONGEST = 300
"""Letters of a line, at most."""


def brief(shown: Any) -> str:
    """The ``repr`` of a dataclass with arrays; set as ``__repr__ = brief`` in its body.

    Args:
        shown: an instance of a dataclass.

    Example:
        >>> import numpy as np
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False)
        ... class Result:
        ...     name: str
        ...     values: np.ndarray
        ...     __repr__ = brief
        >>> Result("a", np.zeros((30, 64)))
        Result(name='a', values=[30 × 64])
    """
    parts = [f"{f.name}={_value(getattr(shown, f.name))}" for f in fields(shown) if f.repr]
    line = f"{type(shown).__name__}({', '.join(parts)})"
    return line if len(line) <= LONGEST else line[: LONGEST - 2] + "…)"


def _value(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, (int, float)):
        sizes = [str(int(n)) for n in shape]
        return f"[{' × '.join(sizes)}]" if sizes else f"{float(value):.4g}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, dict, set)) and len(repr(value)) > 60:
        return f"{len(value)} {'entries' if len(value) != 1 else 'entry'}"
    words = repr(value).split("\n")[0]
    return words if len(words) <= 80 else words[:79] + "…"
