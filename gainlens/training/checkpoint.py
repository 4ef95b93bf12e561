"""Checkpoints of a run: one safetensors file, written under another name and renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import InputError
from gainlens.files import load_tensors, save_tensors
from gainlens.files.schema import (
    Mismatch,
    check_names,
    check_tensor,
    checking,
    listing,
    number,
    record,
    text,
    whole,
)
from gainlens.files.schema import facts as facts_
from gainlens.training.slices import Slice

KIND = "training"
RANDOM = "random"
CHECKPOINT = record(
    header=facts_,
    progress=record(
        step=whole(1),
        curve=listing(facts_, least=1),
        tokens=whole(1),
        seconds=number(0),
        stopped=text("steps", "margin"),
        bytes=facts_,
    ),
    optimizer=facts_,
)
"""The header of a checkpoint."""


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
        slices: slices with their leaves.
        optimizer: the optimiser of those leaves.
        header: what must be unchanged for a run to resume.
        progress: progress of the run.
    """
    tensors = {f"active.{p.name}": p.leaf for p in slices if p.leaf is not None}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    tensors[RANDOM] = torch.get_rng_state()
    facts = {"header": dict(header), "progress": dict(progress), "optimizer": plain}
    save_tensors(path, KIND, tensors, facts)


def load_checkpoint(
    path: Path, slices: list[Slice], optimizer: Any, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore a run; returns its progress.

    Raises:
        FileFormatError: damaged, not a checkpoint, or with numbers that are not finite.
        InputError: the checkpoint is of another model, plan, text, seed or setting; the message
            says which.
    """
    tensors, facts = load_tensors(path, KIND)
    with checking(str(path), "checkpoint"):
        CHECKPOINT(facts, "facts")
    for key, value in header.items():
        then = facts["header"].get(key)
        if then != value:
            raise InputError(
                f"checkpoint {str(path)!r} is of a run with other {key} ({_short(then)}): this one "
                f"has {_short(value)}; expected the same, or a new file"
            )
    with checking(str(path), "checkpoint"):
        progress: dict[str, Any] = facts["progress"]
        if not progress["curve"] or progress["curve"][-1]["step"] != progress["step"]:
            raise Mismatch("its curve does not end with its last step")
        leaves = {f"active.{p.name}": p.leaf for p in slices if p.leaf is not None}
        state = _optimizer_state(tensors, facts["optimizer"], list(leaves.values()))
        kept = [name for name in tensors if not name.startswith("optimizer.")]
        check_names(dict.fromkeys(kept), [*leaves, RANDOM])
        for name, leaf in leaves.items():
            check_tensor(tensors[name], name, leaf.dtype, leaf.shape)
        whole_state = optimizer.state_dict()
        torch.Generator().set_state(tensors[RANDOM])
    # All is checked: only now does anything of the run change.
    for name, leaf in leaves.items():
        with torch.no_grad():
            leaf.copy_(tensors[name])
    optimizer.load_state_dict({"state": state, "param_groups": whole_state["param_groups"]})
    torch.set_rng_state(tensors[RANDOM])
    return dict(progress)


def _optimizer_state(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], leaves: list[torch.Tensor]
) -> dict[int, dict[str, Any]]:
    """State of each leaf by its number; a tensor is a number, or shaped like its leaf."""
    state: dict[int, dict[str, Any]] = {int(i): dict(row) for i, row in plain.items()}
    shapes = sorted({tuple(leaf.shape) for leaf in leaves})
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            if tuple(tensor.shape) not in ((), (1,), *shapes):
                raise Mismatch(f"{name} has shape {tuple(tensor.shape)}, which no leaf has")
            check_tensor(tensor, name, tensor.dtype, tensor.shape)
            state.setdefault(int(index), {})[key] = tensor.clone()
    if odd := [i for i in state if not 0 <= i < len(leaves)]:
        raise Mismatch(f"its optimiser has state of leaf {odd[0]}, of {len(leaves)} leaves")
    return state


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
