"""Weights that are not in memory: accelerate reads those of a module each time it runs.

A model that was loaded with a ``device_map`` may keep weights on disk or, beside a GPU, in the
memory of the CPU. Its parameters are then on the device ``meta``, and a hook of accelerate on each
module knows where the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped

from gainlens.errors import FileFormatError, UnsupportedModelError

INSIDE = "._original_component"
"""What a bridge adds to the names of the modules that it wraps."""


class StoredWeights(Mapping[str, torch.Tensor]):
    """Parameters by transformers' names; one that is not in memory is read when it is asked for.

    What was read is not kept, so going through the weights takes the memory of one of them.

    Args:
        model: a transformers model, or the one in a bridge.
        inside: parts of the names that wrappers added, to be left out.

    Raises:
        FileFormatError: when a weight is asked for whose file is gone, truncated or lacks it.

    Example:
        >>> weights = StoredWeights(model.original_model)
        >>> weights["model.norm.weight"].shape
        torch.Size([128])
    """

    def __init__(self, model: Any, inside: Sequence[str] = (INSIDE,)) -> None:
        self._parameters: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = name
            for part in inside:
                plain = plain.replace(part, "")
            # A bridge's alias may equal one of the original's names; the original takes precedence.
            if plain not in self._parameters or INSIDE in name:
                self._parameters[plain], self._names[plain] = parameter, name
        self._readers = _readers(model) if self.elsewhere else {}

    def __repr__(self) -> str:
        return f"StoredWeights({len(self)} weights, {len(self.elsewhere)} of them not in memory)"

    def __getitem__(self, name: str) -> Shaped[torch.Tensor, "..."]:
        parameter = self._parameters[name]
        read = self._readers.get(self._names[name]) if parameter.is_meta else None
        return (parameter if read is None else read()).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters  # Mapping's own would read the weight

    def like(self, name: str) -> Shaped[torch.Tensor, "..."]:
        """The parameter as the model holds it: on ``meta``, without numbers, if not in memory."""
        return self._parameters[name].detach()

    def place(self, name: str) -> Hashable:
        """The same for two names of one weight."""
        held = self._parameters[name]
        return id(held) if held.is_meta else (held.data_ptr(), held.shape)

    def under(self, path: str) -> Mapping[str, torch.Tensor]:
        """The weights whose names start with ``path``, by the rest of their names."""
        return _Under(self, path)

    @property
    def elsewhere(self) -> list[str]:
        """Names of the parameters that are not in memory."""
        return [name for name, held in self._parameters.items() if held.is_meta]

    @property
    def lost(self) -> list[str]:
        """Names of those that are not in memory and that nothing can read."""
        return [name for name in self.elsewhere if self._names[name] not in self._readers]


class _Under(Mapping[str, torch.Tensor]):
    def __init__(self, whole: StoredWeights, path: str) -> None:
        self._whole, self._path = whole, path

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._whole[self._path + name]

    def __iter__(self) -> Iterator[str]:
        return (n[len(self._path) :] for n in self._whole if n.startswith(self._path))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self._path}{name}" in self._whole


def _readers(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each parameter that a hook of accelerate loads, by its name, what reads it."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        # Not getattr: a bridge's modules answer for what they wrap.
        hook = vars(module).get("_hf_hook")
        for one in (hook, *getattr(hook, "hooks", ())):
            stored = getattr(one, "weights_map", None)
            if stored is None:
                continue
            within = bool(getattr(one, "place_submodules", False))
            for leaf, parameter in module.named_parameters(recurse=within, remove_duplicate=False):
                if parameter.is_meta:
                    name = f"{path}.{leaf}" if path else leaf
                    found[name] = partial(_read, stored, leaf, name)
    return found


def _read(stored: Any, leaf: str, name: str) -> torch.Tensor:
    try:
        return torch.as_tensor(stored[leaf])
    except Exception as error:  # of safetensors, the system or the index
        words = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(
            f"weight {name.replace(INSIDE, '')!r} can't be read from where it is kept: {words}"
        ) from None


def is_offloaded(model: Any) -> bool:
    """Whether some weights of a model are not in memory.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model.
    """
    inside = getattr(model, "original_model", model)
    return any(parameter.is_meta for parameter in inside.parameters())


def check_readable(model: Any) -> None:
    """Raise ``UnsupportedModelError`` if weights are neither in memory nor read when they run.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model.
    """
    lost = StoredWeights(getattr(model, "original_model", model)).lost
    if lost:
        raise UnsupportedModelError(
            f"weight {lost[0]!r} and {len(lost) - 1} more are not in memory (device meta), and no "
            "hook of accelerate reads them: load the model with its weights, or with a device_map"
        )


def counted(model: Any) -> list[torch.Tensor]:
    """Every parameter of a transformers model once, for counting.

    Weights that are tied are one parameter in memory, but two where accelerate reads them.
    """
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return [p for name, p in model.named_parameters() if not (p.is_meta and name in tied)]


def read_once(model: Any) -> None:
    """Halve what a bridge reads: it loads a module's weights, and then the module does so itself.

    What was read first is handed out the second time, or dropped when another module reads.

    Args:
        model: the transformers model in a bridge.
    """
    last = _Last()
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "weights_map", None) is not None:
                one.weights_map = _ReadOnce(one.weights_map, last)


class _Last:
    """What was read last, and of which module."""

    owner: object = None

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}


class _ReadOnce(Mapping[str, Any]):
    def __init__(self, stored: Any, last: _Last) -> None:
        self._stored, self._last = stored, last

    def __getitem__(self, name: str) -> Any:
        if self._last.owner is not self:
            self._last.owner, self._last.tensors = self, {}
        known = self._last.tensors.pop(name, None)
        # What was made in inference mode can't take part in a backward pass.
        if known is not None and known.is_inference() == torch.is_inference_mode_enabled():
            return known
        found = self._stored[name]
        self._last.tensors[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored
