"""``SurgeryCurve``: the losses of a sweep, per document, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gainlens.analysis.intervals import t_interval
from gainlens.analysis.points import Point
from gainlens.analysis.verdict import Verdict, non_inferiority
from gainlens.errors import FileFormatError, InputError
from gainlens.files import FORMAT, read_json, write_json
from gainlens.probes.gains import ModelCard


@dataclass(frozen=True, eq=False)
class SurgeryCurve:
    """Losses of every point of a sweep on the same documents.

    Attributes:
        points: what each point cut.
        losses: nats per token, ``[point, document]``.
        baseline: of the intact model, ``[document]``.
        model: the model.
        text: fingerprint of the validation text.
        n_tokens: length of the validation text.
    """

    points: list[Point]
    losses: Float[np.ndarray, "point document"]
    baseline: Float[np.ndarray, " document"]
    model: ModelCard
    text: str
    n_tokens: int

    def __repr__(self) -> str:
        fractions = sorted({p.fraction for p in self.points})
        return (
            f"SurgeryCurve({self.model.architecture}, {len(self.points)} points at "
            f"{', '.join(f'{f:.0%}' for f in fractions)}, {self.n_documents} documents, "
            f"intact loss {self.baseline.mean():.4f} nats)"
        )

    @property
    def n_documents(self) -> int:
        """Number of validation documents."""
        return len(self.baseline)

    def deltas(self, index: int) -> Float[np.ndarray, " document"]:
        """Rise of the loss of each document at a point, nats per token."""
        difference: Float[np.ndarray, " document"] = self.losses[index] - self.baseline
        return difference

    def table(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One row per point: what was cut, mean loss, rise over the intact model, its interval.

        Losses and rises are in nats per token; the interval is Student's, over documents.
        """
        rows = []
        for index, point in enumerate(self.points):
            delta = self.deltas(index)
            rows.append(
                {
                    **asdict(point),
                    "loss": float(self.losses[index].mean()),
                    "delta": float(delta.mean()),
                    "interval": t_interval(delta, level),
                }
            )
        return rows

    def find(self, **wanted: Any) -> list[int]:
        """Indices of the points with these values, e.g. ``order="random", fraction=0.5``."""
        return [
            i
            for i, point in enumerate(self.points)
            if all(getattr(point, key) == value for key, value in wanted.items())
        ]

    def verdict(
        self, fraction: float, margin: float, *, level: float = 0.95, **choice: Any
    ) -> Verdict:
        """Is the damage of cutting the quietest ``fraction`` below ``margin``?

        Args:
            fraction: a fraction of this sweep.
            margin: rise of the loss in nats per token that would still count as flat, above 0.
            level: coverage of the two-sided interval.
            choice: ``score``, ``scope`` … where the sweep has several.

        Raises:
            InputError: no such point, several, or a margin of zero or below.
        """
        found = self.find(order="quietest", fraction=fraction, **choice)
        if len(found) != 1:
            have = sorted({p.fraction for p in self.points})
            raise InputError(
                f"fraction={fraction!r} names {len(found)} points of this sweep: expected one of "
                f"{have}" + (", with score=… and scope=…" if len(found) > 1 else "")
            )
        delta = self.deltas(found[0])
        point = self.points[found[0]]
        claim = (
            f"{fraction:.0%} of the key dimensions can be cut ({point.score}, {point.scope}, "
            f"{point.unit}, {point.mode}) at less than {margin:g} nats"
        )
        return non_inferiority(
            claim, float(delta.mean()), t_interval(delta, level), margin, self.n_documents
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` reads them back."""
        return {
            "format": FORMAT,
            "kind": "surgery",
            "model": asdict(self.model),
            "text": self.text,
            "n_tokens": self.n_tokens,
            "baseline": self.baseline.tolist(),
            "points": [
                {**asdict(point), "losses": self.losses[i].tolist()}
                for i, point in enumerate(self.points)
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> SurgeryCurve:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: missing, truncated, or not a surgery file.
        """
        data = read_json(path)
        try:
            if data["format"] != FORMAT or data["kind"] != "surgery":
                raise FileFormatError(f"{path} is not a gainlens surgery file")
            points = [dict(p) for p in data["points"]]
            losses = np.array([p.pop("losses") for p in points], dtype=np.float64)
            baseline = np.array(data["baseline"], dtype=np.float64)
            if losses.shape != (len(points), len(baseline)):
                raise FileFormatError(f"{path}: points and documents do not match")
            return cls(
                [Point(**p) for p in points],
                losses,
                baseline,
                ModelCard(**data["model"]),
                data["text"],
                data["n_tokens"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} lacks or mislabels a field: {error}") from None
