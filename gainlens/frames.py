"""Convert rows to a pandas table. pandas is optional; gainlens itself doesn't need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gainlens.errors import InputError


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A ``pandas.DataFrame`` with one row per mapping; an interval becomes ``low`` and ``high``.

    Args:
        rows: mappings from column name to value.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise InputError(
            "to_dataframe() needs pandas, which is not installed: pip install pandas"
        ) from None
    return DataFrame([_flat(row) for row in rows])


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "interval":
            flat["low"], flat["high"] = value
        else:
            flat[name] = value
    return flat
