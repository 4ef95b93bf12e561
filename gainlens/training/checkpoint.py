"""Checkpoints of a run: one safetensors file, written beside and renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import FileFormatError, InputError
from gainlens.files import load_tensors, save_tensors
from gainlens.training.slices import Slice

KIND = "training"


def save_checkpoint(
    path: Path,
    slices: list[Slice],
    optimizer: Any,
    header: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Write active slices, optimiser state and random state.

    Args:
        path: the file.
        slices: with their leaves.
        optimizer: over those leaves.
        header: what must be the same for a run to go on.
        progress: where it stands.
    """
    tensors = {f"active.{p.name}": p.leaf for p in slices if p.leaf is not None}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    tensors["random"] = torch.get_rng_state()
    facts = {"header": dict(header), "progress": dict(progress), "optimizer": plain}
    save_tensors(path, KIND, tensors, facts)


def load_checkpoint(
    path: Path, slices: list[Slice], optimizer: Any, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore a run; returns its progress.

    Raises:
        FileFormatError: damaged, or no checkpoint.
        InputError: of another model, plan, text, seed or setting; says which is different.
    """
    tensors, facts = load_tensors(path, KIND)
    try:
        then, progress, plain = facts["header"], facts["progress"], facts["optimizer"]
        for key, value in header.items():
            if then.get(key) != value:
                raise InputError(
                    f"checkpoint {str(path)!r} is of a run with other {key} "
                    f"({_short(then.get(key))}): this one has {_short(value)}; expected the same, "
                    "or a new file"
                )
        state: dict[int, dict[str, Any]] = {int(i): dict(row) for i, row in plain.items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor.clone()
        for part in slices:
            if part.leaf is not None:
                with torch.no_grad():
                    part.leaf.copy_(tensors[f"active.{part.name}"])
        whole = optimizer.state_dict()
        optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        torch.set_rng_state(tensors["random"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{path} is not a whole checkpoint: {error!r}") from None
    return dict(progress)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
