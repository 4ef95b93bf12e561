"""Attach hook functions to a TransformerLens model and take off exactly those again."""

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
"""How many cuts are in place, of the models that have one."""


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
def attached(model: Any, hooks: Sequence[Hook], *, cut: bool = False) -> Iterator[None]:
    """Attach forward hooks; on exit, also after an exception, remove these and no others.

    Other threads that measure or cut the same model wait until this one is done.

    Args:
        model: a TransformerBridge or HookedTransformer.
        hooks: names and functions.
        cut: whether the hooks change the model for the user, so that ``check_intact`` sees it.
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
    """One hook that is being added; found again also where Ctrl-C came in the middle."""

    def __init__(self, point: Any) -> None:
        self.point = point
        self.handles: list[Any] = list(point.fwd_hooks)
        self.raw = set(point._forward_hooks)
        self.finished = False

    def done(self) -> None:
        """Remember what is new: another hook may be added to the point later."""
        handles = [h for h in self.point.fwd_hooks if not any(h is old for old in self.handles)]
        raw = set(self.point._forward_hooks) - self.raw
        self.handles, self.raw, self.finished = handles, raw, True

    def undo(self) -> None:
        """Take it off."""
        if not self.finished:
            self.done()
        for key in self.raw:
            self.point._forward_hooks.pop(key, None)
        for handle in self.handles:
            handle.hook.remove()
        mine = self.handles
        self.point.fwd_hooks[:] = [h for h in self.point.fwd_hooks if not any(h is m for m in mine)]


def _take_off(added: list[_Addition]) -> None:
    """Remove all, last first; Ctrl-C in the middle is raised when all are off."""
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
    """Whether ``gainlens.ablate`` has a cut in place on ``model``."""
    return _CUTS.get(model, 0) > 0


def check_intact(model: Any, what: str) -> None:
    """Refuse to compare with "the intact model" one that is cut at the moment.

    Args:
        model: a TransformerBridge or HookedTransformer.
        what: is called, for the message.

    Raises:
        InputError: a cut is in place.
    """
    if is_cut(model):
        raise InputError(
            f"{what} inside gainlens.ablate: the model that it would take for the intact one is "
            "cut; leave the with block first"
        )
