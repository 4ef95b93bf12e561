"""Running a model: the device of its tokens, eval mode, and one thread at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_NEW_LOCK = threading.Lock()

P = ParamSpec("P")
R = TypeVar("R")


def model_device(model: Any) -> torch.device:
    """The device on which ``model`` expects its tokens: that of its embedding.

    The first parameter of a quantised or partly offloaded model may be on another device, or hold
    no data (device ``meta``).

    Args:
        model: a TransformerBridge, a HookedTransformer, a transformers model or any module.
    """
    inside = getattr(model, "original_model", model)
    hooked = getattr(inside, "_hf_hook", None)  # accelerate moves the inputs to this device
    execution = getattr(hooked, "execution_device", None)
    if execution is not None:
        return torch.device(f"cuda:{execution}" if isinstance(execution, int) else execution)
    weight = _embedding_weight(inside)
    if weight is not None and not weight.is_meta:
        return weight.device
    for tensor in (*inside.parameters(), *inside.buffers()):
        if not tensor.is_meta:
            found: torch.device = tensor.device
            return found
    return torch.device("cpu")


def _embedding_weight(model: Any) -> torch.Tensor | None:
    """The token embedding's matrix, or None if not found."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if callable(getter) else getattr(model, "embed", None)
    except (AttributeError, NotImplementedError):
        return None
    for owner in (module, getattr(module, "original_component", None)):
        for name in ("weight", "W_E"):
            weight = getattr(owner, name, None)
            if isinstance(weight, torch.Tensor):
                return weight
    return None


def is_exact(model: Any) -> bool:
    """Whether activations are at least float32, so that two ways of computing agree closely."""
    inside = getattr(model, "original_model", model)
    weight = _embedding_weight(inside)
    if weight is None or not weight.is_floating_point():
        weight = next((p for p in inside.parameters() if p.is_floating_point()), None)
    return weight is None or weight.dtype in (torch.float32, torch.float64)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run ``model`` in eval mode inside the ``with``; restore each module's mode afterwards.

    Args:
        model: any module. A bridge's wrapped model is included, though not among its modules.
    """
    inside = getattr(model, "original_model", None)
    parts = [model] if inside is None else [model, inside]
    training = [module for part in parts for module in part.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def held(model: Any) -> Iterator[None]:
    """Lock ``model``: other threads that measure or cut it wait until the ``with`` ends.

    The lock is reentrant. Calls of the model itself are not blocked.
    """
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


def measures(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of a model: run it in eval mode, one thread at a time."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs["model"]
        if not isinstance(model, torch.nn.Module):  # the function itself raises the error
            return function(*args, **kwargs)
        with held(model), evaluating(model):
            return function(*args, **kwargs)

    return run
