"""Coordinate maps on disk: one safetensors file with a JSON header, a tree of parts.

Arrays are tensors named by their path in the tree. Everything else is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gainlens.analysis.map.fields import check_part
from gainlens.files import FORMAT, load_tensors, save_tensors
from gainlens.files.schema import Mismatch, checking

if TYPE_CHECKING:
    from gainlens.analysis.map.coordinates import CoordinateMap


def save_map(cmap: CoordinateMap, path: str | Path) -> None:
    """Write a map atomically."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(cmap, "map", tensors)
    save_tensors(path, "map", tensors, {"map": tree})


def load_map(path: str | Path, root: type, parts: Sequence[type]) -> Any:
    """Read a map; see ``CoordinateMap.load``.

    Args:
        path: path of the file.
        root: class of the map itself.
        parts: the only other classes that may be built from a file.
    """
    tensors, facts = load_tensors(path, "map")
    with checking(str(path), "map"):
        found = _unpack(facts["map"], tensors, {c.__name__: c for c in (root, *parts)})
        if not isinstance(found, root):
            raise Mismatch("its root is not a map")
        check_part(found)
    return found


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        tensors[name] = torch.tensor(value)  # a copy: the parts of a map share arrays
        return {"$tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        packed = {f.name: _pack(getattr(value, f.name), f"{name}.{f.name}", tensors)
                  for f in fields(value)}  # fmt: skip
        return {"$class": type(value).__name__, "fields": packed}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, dict):
        # Keys may be numbers, which JSON would convert to strings.
        return {"$dict": [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    return plain(value)


def _unpack(value: Any, tensors: dict[str, torch.Tensor], parts: dict[str, type]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors, parts) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]].numpy()
    if "$tuple" in value:
        return tuple(_unpack(v, tensors, parts) for v in value["$tuple"])
    if "$dict" in value:
        return {k: _unpack(v, tensors, parts) for k, v in value["$dict"]}
    cls = parts[value["$class"]]
    return cls(**{k: _unpack(v, tensors, parts) for k, v in value["fields"].items()})


def plain(value: Any) -> Any:
    """Numbers, strings and containers for JSON; NaN and infinity become None."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def map_json(cmap: CoordinateMap) -> dict[str, Any]:
    """The numbers of a map for a report: full matrices of layers, and a summary of heads."""
    low, high = cmap.effect_interval
    claims = ["shared", "shared by heads", "cosine"]
    claims += [] if cmap.sinks is None else ["sinks"]
    claims += [] if cmap.sharing_cost is None else ["sharing cost"]
    found: dict[str, Any] = {
        "format": FORMAT,
        "kind": "map",
        "answer": cmap.answer,
        "answer_by_head": cmap.answer_by_head,
        "effect": {"residual_correlation": cmap.effect, "interval": [low, high]},
        "summary": cmap.summary(),
        "facts": cmap.facts,
        "n_documents": cmap.n_documents,
        "units": {**cmap.units.to_json(), "wavelength": cmap.units.wavelength},
        "measures": cmap.table(),
        "universal_units": cmap.universal_units,
        "universal_units_by_head": cmap.universal_units_by_head,
        "units_beyond_chance": cmap.universal.beyond_chance,
        "universal": cmap.universal.table(),
        "universal_by_head": cmap.universal_by_head.table(),
        "heads": cmap.heads.summary() if cmap.heads else None,
        "head_order": cmap.heads.order if cmap.heads else None,
        "cv": cmap.cv,
        "cosine": cmap.cosine,
        "centred_cosine": cmap.centred_cosine,
        "null_cosine": cmap.null_cosine,
        "frequency_null_cosine": cmap.frequency_null_cosine,
        "residual_correlation": cmap.residual_correlation,
        "head_correlation": cmap.head_correlation,
        "p_values": cmap.p_values,
        "profiles": cmap.profiles,
        "verdicts": [cmap.verdict(claim=claim).to_json() for claim in claims],
    }
    for name in ("sinks", "red_line", "sharing_cost", "stability"):
        part = getattr(cmap, name)
        found[name] = None if part is None else part.to_json()
    rounded: dict[str, Any] = plain(found)
    return rounded
