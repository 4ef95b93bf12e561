"""The slice plan of a folder, as gainlens writes it into ``config.json``.

A thin head is a row of slot pairs (s, s + width/2). Each slot pair turns by one column of a table
of frequencies: the model's own, or the plan's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gainlens_vllm.errors import SlimFolderError

FORMAT = 2
"""The newest format of gainlens files that is read."""
MAX_UNITS = 1 << 28


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
        key_width, value_width: dimensions of a key head and of a value head.
        columns: long ``[kv_head, slot]`` (or one row for all heads), the column of the table that
            each slot pair turns by; None without rotation.
        stored: whether the folder's weights hold ``columns`` as ``rope_index``.
        still: whether some slot pair doesn't turn; its column is the one after the last.
    """

    key_width: int
    value_width: int
    columns: torch.Tensor | None
    stored: bool
    still: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """What was cut.

    Attributes:
        layers: one entry per layer.
        table: float64 radians per token, or None for the frequencies of the model.
        biases: which of ``q``, ``k``, ``v``, ``o`` have one.
    """

    layers: tuple[Layer, ...]
    table: torch.Tensor | None
    biases: str


def read_plan(
    stored: Any, shape: tuple[int, int, int], rotary_dim: int, where: str = "config.json"
) -> Plan:
    """Read and check ``gainlens`` of a ``config.json``.

    Args:
        stored: that entry.
        shape: ``(n_layers, n_kv_heads, d_head)`` of the configuration.
        rotary_dim: how many dimensions of a full head rotate.
        where: the folder, for messages.

    Raises:
        SlimFolderError: not a plan, of a newer or older format, damaged, or of another model.
    """
    if not isinstance(stored, Mapping) or not isinstance(stored.get("plan"), Mapping):
        raise SlimFolderError(f"{where} is not a slim folder: its config.json holds no slice plan")
    plan = stored["plan"]
    check_format(plan.get("format"), where)
    content = {key: value for key, value in plan.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != plan.get("checksum"):
        raise SlimFolderError(f"{where}: its slice plan is damaged (the checksum does not match)")
    try:
        with torch.device("cpu"):  # vLLM builds models where tensors are made on the GPU
            return _plan(plan, stored.get("biases"), shape, rotary_dim, where)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise SlimFolderError(f"{where}: its slice plan can't be read ({error!r})") from None


def check_format(found: Any, where: str) -> None:
    """Raise ``SlimFolderError`` unless ``found`` is the format of this plug-in."""
    name, _, number = str(found).partition("-")
    if name != "gainlens" or not number.isdecimal():
        raise SlimFolderError(f"{where} is not a slim folder: the format of its plan is {found!r}")
    if int(number) > FORMAT:
        raise SlimFolderError(
            f"{where} has format {found}, and this gainlens-vllm reads gainlens-{FORMAT}: "
            "upgrade gainlens-vllm"
        )
    if int(number) < FORMAT:
        raise SlimFolderError(
            f"{where} has format {found}, and this gainlens-vllm reads gainlens-{FORMAT}: export "
            "it again with a newer gainlens"
        )


def _plan(
    plan: Mapping[str, Any],
    biases: Any,
    shape: tuple[int, int, int],
    rotary_dim: int,
    where: str,
) -> Plan:
    n_layers, n_kv_heads, d_head = shape
    if tuple(plan["shape"]) != shape or n_layers * n_kv_heads * d_head > MAX_UNITS:
        raise SlimFolderError(
            f"{where}: its plan is of a model with [layer, kv_head, d_head] = "
            f"{tuple(plan['shape'])}, its config of one with {shape}"
        )
    if not isinstance(biases, str) or set(biases) - set("qkvo"):
        raise SlimFolderError(f"{where}: biases={biases!r}, expected letters of q, k, v, o")
    turning = rotary_dim if plan["basis"] == "own" else 0
    keep, values = plan["keep"], plan["value_widths"] or [d_head] * n_layers
    heads = [len(layer) for layer in keep]
    if len(keep) != n_layers or set(heads) != {n_kv_heads} or len(values) != n_layers:
        raise SlimFolderError(f"{where}: its plan does not have {n_layers} × {n_kv_heads} heads")
    frequencies = None
    if plan.get("frequencies") is not None:
        if turning != d_head:
            raise SlimFolderError(f"{where}: its plan has slots, and not every dimension rotates")
        found = torch.tensor(plan["frequencies"], dtype=torch.float64)
        if found.shape[-1] != d_head // 2 or not bool(torch.isfinite(found).all()):
            raise IndexError("frequencies that are not those of its pairs")
        frequencies = found.expand(n_layers, n_kv_heads, d_head // 2)
    made = [lay_out(k, v, d_head, turning) for k, v in zip(keep, values, strict=True)]
    if frequencies is None:
        return Plan(tuple(made), None, biases)
    pairs = [layer.columns for layer in made if layer.columns is not None]
    used = [f.gather(1, pair) for f, pair in zip(frequencies, pairs, strict=True)]
    table = torch.unique(torch.cat([u.flatten() for u in used]))
    layers = [
        Layer(layer.key_width, layer.value_width, torch.searchsorted(table, u), True, False)
        for layer, u in zip(made, used, strict=True)
    ]
    return Plan(tuple(layers), table, biases)


def lay_out(keep: Sequence[Sequence[int]], value_width: int, d_head: int, rotary_dim: int) -> Layer:
    """Slots of one layer, from the kept dimensions of its heads.

    Args:
        keep: rising dimensions, per key head.
        value_width: dimensions of a value head.
        d_head, rotary_dim: of the full head; pairs are (i, i + rotary_dim/2).
    """
    n_pairs = rotary_dim // 2
    if not all(head and head[0] >= 0 and head[-1] < d_head for head in keep):
        raise IndexError("a key head keeps no dimension, or one that it does not have")
    if not rotary_dim:
        return Layer(max(len(head) for head in keep), value_width, None, False, False)
    pairs = [[d for d in head if d < n_pairs] for head in keep]
    still = [(sum(d >= rotary_dim for d in head) + 1) // 2 for head in keep]
    slots = max(len(p) + s for p, s in zip(pairs, still, strict=True))
    # An empty slot holds zeros and may turn by anything; a slot that must not turn comes after.
    empty = n_pairs if rotary_dim < d_head else 0
    columns = torch.tensor([p + [empty] * (slots - len(p)) for p in pairs])
    natural = rotary_dim == d_head and all(len(head) == d_head for head in keep)
    unturned = bool((columns == n_pairs).any())
    return Layer(2 * slots, value_width, columns, not natural, unturned)


def one_row(columns: torch.Tensor) -> torch.Tensor:
    """``columns`` as the weights store them: one row if all heads have the same."""
    return columns[:1] if bool((columns == columns[:1]).all()) else columns
