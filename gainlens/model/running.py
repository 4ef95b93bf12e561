"""How a model is run: where its tokens go, in eval mode, by one thread at a time."""

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
    """The device on which ``model`` takes its tokens: that of its embedding.

    The first parameter of a quantised or partly offloaded model may lie somewhere else, or hold
    no numbers (device ``meta``).

    Args:
        model: a TransformerBridge, a HookedTransformer, a transformers model or any module.
    """
    inside = getattr(model, "original_model", model)
    hooked = getattr(inside, "_hf_hook", None)  # accelerate moves what goes in to this device
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
    """The token embedding's matrix, or None where there is none to be found."""
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
    """Whether the activations are float32 or wider, so that two ways of computing agree closely."""
    inside = getattr(model, "original_model", model)
    weight = _embedding_weight(inside)
    if weight is None or not weight.is_floating_point():
        weight = next((p for p in inside.parameters() if p.is_floating_point()), None)
    return weight is None or weight.dtype in (torch.float32, torch.float64)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout inside the ``with``; after it every module is in the mode that it was in.

    Args:
        model: any module. A bridge does not list the model that it wraps among its modules.
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
    """No other thread measures or cuts ``model`` inside the ``with``; they wait.

    One thread may nest as often as it likes. Calls of the model itself are not held up.
    """
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


def measures(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument is a model, run in eval mode and by one thread at a time."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs["model"]
        if not isinstance(model, torch.nn.Module):  # which the function itself refuses
            return function(*args, **kwargs)
        with held(model), evaluating(model):
            return function(*args, **kwargs)

    return run
