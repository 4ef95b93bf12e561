"""A coordinate map as rows: by measure, by pair of layers, by unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gainlens.errors import InputError

if TYPE_CHECKING:
    from gainlens.analysis.map.coordinates import CoordinateMap
    from gainlens.analysis.map.nulls import PairTest


def map_rows(cmap: CoordinateMap, rows: str) -> list[dict[str, Any]]:
    """Rows of one kind; see ``CoordinateMap.to_dataframe``.

    Raises:
        InputError: the kind is unknown.
    """
    if rows not in ROWS:
        raise InputError(f"rows={rows!r} is not one of {', '.join(ROWS)}")
    found: list[dict[str, Any]] = ROWS[rows](cmap)
    return found


def measure_rows(cmap: CoordinateMap) -> list[dict[str, Any]]:
    """One row per measure and null: its mean over pairs, its chance level and p-values."""
    found = []
    for null, by_measure in cmap.tests.items():
        for name, test in by_measure.items():
            corrected = _pairs(cmap, test.p_corrected)
            found.append(
                {
                    "measure": name,
                    "null": null,
                    "value": float(_pairs(cmap, _measure(cmap, name)).mean()),
                    "chance": float(_pairs(cmap, _chance(name, test)).mean()),
                    "p_mean": test.p_mean,
                    "pairs_significant": float((corrected < 0.05).mean()),
                    "smallest_p_corrected": float(corrected.min()),
                }
            )
    return found


def pair_rows(cmap: CoordinateMap) -> list[dict[str, Any]]:
    """One row per pair of living layers, with every similarity measure and its null."""
    kept = cmap.frequency_null_cosine
    return [
        {
            "layer": int(a),
            "layer2": int(b),
            "cosine": float(cmap.cosine[a, b]),
            "null_cosine": float(cmap.null_cosine[a, b]),
            **({} if kept is None else {"null_cosine_frequency": float(kept[a, b])}),
            "residual_correlation": float(cmap.residual_correlation[a, b]),
            "p": float(cmap.p_values[a, b]),
            "centred_cosine": float(cmap.centred_cosine[a, b]),
            "spearman": float(cmap.spearman[a, b]),
        }
        for i, a in enumerate(cmap.alive)
        for b in cmap.alive[i + 1 :]
    ]


def unit_rows(cmap: CoordinateMap) -> list[dict[str, Any]]:
    """One row per unit, by decreasing presence, with its dimensions and wavelength in tokens."""
    wave = cmap.units.wavelength
    by_head = cmap.universal_by_head
    return [
        {
            **row,
            "universal": row["unit"] in cmap.universal_units,
            "universal_by_head": row["unit"] in cmap.universal_units_by_head,
            "presence_by_head": float(by_head.presence[row["unit"]]),
            "dims": list(cmap.units.dims[row["unit"]]),
            "wavelength": wave[row["unit"]],
        }
        for row in cmap.universal.table()
    ]


ROWS = {"pairs": pair_rows, "units": unit_rows, "measures": measure_rows}


def _pairs(cmap: CoordinateMap, matrix: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(len(cmap.alive), 1)
    values: np.ndarray = matrix[cmap.alive[i], cmap.alive[j]]
    return values


def _measure(cmap: CoordinateMap, name: str) -> np.ndarray:
    if name.startswith("top "):
        return cmap.overlap[int(name[4:])]
    return {
        "cosine": cmap.cosine,
        "centred": cmap.centred_cosine,
        "spearman": cmap.spearman,
        "layer": cmap.residual_correlation,
        "head": cmap.head_correlation,
    }[name]


def _chance(name: str, test: PairTest) -> np.ndarray:
    # The null mean of an overlap is that of intersection / k; as Jaccard: x / (2 - x).
    x = test.null_mean
    return x / (2 - x) if name.startswith("top ") else x
