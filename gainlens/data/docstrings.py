"""The text ``docstrings``: what NumPy and PyTorch say about their public functions and classes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

MODULES = (
    "numpy",
    "numpy.fft",
    "numpy.linalg",
    "numpy.ma",
    "numpy.polynomial",
    "numpy.random",
    "torch",
    "torch.distributions",
    "torch.fft",
    "torch.linalg",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.nn.utils",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.special",
    "torch.utils.data",
)
"""Named one by one: what else a package has imported differs between processes."""


def docstrings() -> Iterator[str]:
    """Each docstring once, in a fixed order, without its indentation."""
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        for owner in (module, *_public(module, inspect.isclass)):
            for item in _public(owner, callable):
                text = inspect.cleandoc(item.__doc__) if isinstance(item.__doc__, str) else ""
                if text and text not in seen:
                    seen.add(text)
                    yield text


def _public(owner: Any, kind: Any) -> Iterator[Any]:
    """Own attributes without an underscore, in the order of their names."""
    for name, item in sorted(vars(owner).items()):
        if not name.startswith("_") and kind(item):
            yield item
