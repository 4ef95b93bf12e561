"""Attach hook functions to a TransformerLens model, and remove only those hooks on exit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from gainlens.errors import InputError, UnsupportedModelError
from gainlens.model.running import held

HookFn = Callable[..., "torch.Tensor | None"]
Hook = tuple[str, HookFn]

_CUTS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Number of active cuts per model."""


def hook_point(model: Any, name: str) -> Any | None:
    """The hook point called ``name``, or None. Bridges resolve aliases such as ``hook_k``.

    Hooks are added to the point itself, not by name: in compatibility mode a hook added by alias
    is called once per alias, which would count every token twice.
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
def attached(model: Any, hooks: Sequence[Hook], *, cut: bool = False) -> Iterator[None]:
    """Attach forward hooks; on exit, also after an exception, remove only these.

    Other threads that measure or cut the same model wait until this one is done.

    Args:
        model: a TransformerBridge or HookedTransformer.
        hooks: pairs of hook name and function.
        cut: whether the hooks cut the model, so that ``check_intact`` refuses it.
    """
    added: list[_Addition] = []
    with held(model):
        _CUTS[model] = _CUTS.get(model, 0) + cut
        try:
            for name, fn in hooks:
                point = hook_point(model, name)
                if point is None:
                    raise UnsupportedModelError(f"hook {name!r} does not exist on this model")
                added.append(_Addition(point))
                point.add_hook(fn)
                added[-1].done()
            yield
        finally:
            _take_off(added)
            _CUTS[model] -= cut


class _Addition:
    """One hook being added. It can be found and removed even if Ctrl-C interrupted the addition."""

    def __init__(self, point: Any) -> None:
        self.point = point
        self.handles: list[Any] = list(point.fwd_hooks)
        self.raw = set(point._forward_hooks)
        self.finished = False

    def done(self) -> None:
        """Record the new hooks, since others may be added to the point later."""
        handles = [h for h in self.point.fwd_hooks if not any(h is old for old in self.handles)]
        raw = set(self.point._forward_hooks) - self.raw
        self.handles, self.raw, self.finished = handles, raw, True

    def undo(self) -> None:
        """Remove the hook."""
        if not self.finished:
            self.done()
        for key in self.raw:
            self.point._forward_hooks.pop(key, None)
        for handle in self.handles:
            handle.hook.remove()
        mine = self.handles
        self.point.fwd_hooks[:] = [h for h in self.point.fwd_hooks if not any(h is m for m in mine)]


def _take_off(added: list[_Addition]) -> None:
    """Remove all hooks in reverse order; a Ctrl-C during removal is raised at the end."""
    interrupted: KeyboardInterrupt | None = None
    while added:
        try:
            added[-1].undo()
            added.pop()
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def is_cut(model: Any) -> bool:
    """Whether ``gainlens.ablate`` currently cuts ``model``."""
    return _CUTS.get(model, 0) > 0


def check_intact(model: Any, what: str) -> None:
    """Refuse to use a model as the intact reference while it is cut.

    Args:
        model: a TransformerBridge or HookedTransformer.
        what: name of the calling function, for the message.

    Raises:
        InputError: the model is cut.
    """
    if is_cut(model):
        raise InputError(
            f"{what} inside gainlens.ablate: it needs the intact model, but the model is cut; "
            "leave the with block first"
        )
