"""Attach hook functions to a TransformerLens model and take off exactly those again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from gainlens.errors import UnsupportedModelError

HookFn = Callable[..., "torch.Tensor | None"]
Hook = tuple[str, HookFn]


def hook_point(model: Any, name: str) -> Any | None:
    """The hook point called ``name`` or None. Bridges resolve the ``hook_k`` style aliases.

    The point itself is used, never its name: in compatibility mode a hook added by alias is
    called once per alias, which would count every token twice.
    """
    try:
        found = reduce(
            lambda owner, part: owner[int(part)] if part.isdigit() else getattr(owner, part),
            name.split("."),
            model,
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    return found if hasattr(found, "add_hook") and hasattr(found, "fwd_hooks") else None


@contextmanager
def attached(model: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach forward hooks; on exit, also after an exception, remove these and no others."""
    added: list[tuple[Any, Any]] = []
    try:
        for name, fn in hooks:
            point = hook_point(model, name)
            if point is None:
                raise UnsupportedModelError(f"hook {name!r} does not exist on this model")
            point.add_hook(fn)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in reversed(added):
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
