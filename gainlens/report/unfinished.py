"""The parts of a report that are done, kept until the report is written.

A killed report goes on after its last finished part. The parts lie beside the report's folder, in
``.NAME.unfinished``; they are used only for the plan, weights, texts and versions they were made
with, and removed when the report is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gainlens.analysis.damage_by_distance import DistanceChange
from gainlens.analysis.damage_by_position import PositionRise
from gainlens.analysis.effective_rank import EffectiveRank
from gainlens.analysis.map.universality import UniversalityPrice
from gainlens.analysis.side_controls import SideControls
from gainlens.analysis.task_scores import GroupRow, TaskRow, TaskScores
from gainlens.errors import GainlensError
from gainlens.files import opened, read_json, sealed, write_json
from gainlens.report.figures import Damage

KIND, HEADER, SECONDS = "gainlens-report-part", "header.json", "seconds.json"
RESULTS: dict[str, Any] = {
    found.__name__: found
    for found in (
        Damage,
        DistanceChange,
        EffectiveRank,
        GroupRow,
        PositionRise,
        SideControls,
        TaskRow,
        TaskScores,
        UniversalityPrice,
    )
}
"""Classes of which a part may consist; no other is built from a file."""

T = TypeVar("T")


class Unfinished:
    """The finished parts of one report.

    Args:
        out: folder of the report.
        made_with: what the parts depend on, as plain values; parts of another report are removed.
    """

    def __init__(self, out: Path, made_with: Mapping[str, Any]) -> None:
        self.folder = out.with_name(f".{out.name}.unfinished")
        text = json.dumps(made_with, sort_keys=True, default=str)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        if self._known(self.folder / HEADER) != self._digest:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._seconds: dict[str, float] = self._known(self.folder / SECONDS) or {}

    @property
    def seconds(self) -> float:
        """That all parts took, those of killed runs among them."""
        return sum(self._seconds.values())

    def part(self, name: str, make: Callable[[], T]) -> T:
        """The plain results called ``name``: kept ones, or what ``make`` returns."""

        def load(file: Path) -> T:
            found: T = unpacked(self._read(file))
            return found

        return self.file(
            f"{name}.json", make, lambda file, value: self._write(file, packed(value)), load
        )

    def file(
        self,
        name: str,
        make: Callable[[], T],
        save: Callable[[Path, T], Any],
        load: Callable[[Path], T],
    ) -> T:
        """The same for a result with a file format of its own."""
        path = self.folder / name
        if name in self._seconds:
            try:
                return load(path)
            except (GainlensError, KeyError, TypeError, ValueError):
                pass  # edited or damaged: made again
        started = time.monotonic()
        value = make()
        if not self.folder.exists():  # a mistake that is found before leaves nothing behind
            self.folder.mkdir(parents=True)
            self._write(self.folder / HEADER, self._digest)
        save(path, value)
        self._seconds[name] = time.monotonic() - started
        self._write(self.folder / SECONDS, self._seconds)
        return value

    def done(self) -> None:
        """Remove the parts: the report is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _write(file: Path, content: Any) -> None:
        write_json(file, sealed(KIND, {"content": content}))

    @staticmethod
    def _read(file: Path) -> Any:
        return opened(read_json(file), KIND, str(file))["content"]

    def _known(self, file: Path) -> Any:
        """Content of a file; None where there is none, or a damaged one."""
        try:
            return self._read(file)
        except (GainlensError, KeyError):
            return None


def packed(value: Any) -> Any:
    """Results as plain values from which ``unpacked`` makes equal ones.

    Raises:
        TypeError: a value of a class that is not in ``RESULTS``.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.generic):
        return packed(value.item())
    if isinstance(value, np.ndarray):
        flat = [packed(x) for x in value.ravel().tolist()]
        return {"array": flat, "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, list):
        return [packed(x) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [packed(x) for x in value]}
    if isinstance(value, Mapping):
        return {"items": [[packed(k), packed(v)] for k, v in value.items()]}
    if is_dataclass(value) and RESULTS.get(type(value).__name__) is type(value):
        content = {f.name: packed(getattr(value, f.name)) for f in fields(value)}
        return {"result": type(value).__name__, "fields": content}
    raise TypeError(f"{type(value).__name__} is no result of a report")


def unpacked(value: Any) -> Any:
    """What ``packed`` was given."""
    if isinstance(value, list):
        return [unpacked(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "array" in value:
        flat = [unpacked(x) for x in value["array"]]
        return np.array(flat, dtype=np.dtype(value["dtype"])).reshape(value["shape"])
    if "tuple" in value:
        return tuple(unpacked(x) for x in value["tuple"])
    if "items" in value:
        return {unpacked(k): unpacked(v) for k, v in value["items"]}
    content = {name: unpacked(x) for name, x in value["fields"].items()}
    return RESULTS[value["result"]](**content)
