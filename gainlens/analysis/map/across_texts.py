"""Stability of the map over texts, halves of a text and permutation seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gainlens.analysis.map.coordinates import coordinate_map
from gainlens.analysis.map.similarity import centred_rows
from gainlens.analysis.map.stability import Stability
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains


def map_stability(
    gains: Mapping[str, KeyGains | np.ndarray],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    **settings: Any,
) -> Stability:
    """Make a map for every text and compare them.

    Args:
        gains: gains by name of the text; the texts may be domains, halves of one text or samples.
        seeds: permutation seeds. The first is used for every text, the others for the first text.
        settings: arguments of ``coordinate_map`` (score, stage, n_permutations, …).

    Raises:
        InputError: fewer than two texts, or gains of different shapes.
    """
    if len(gains) < 2:
        raise InputError(f"gains has {len(gains)} text: expected two or more to compare")
    shapes = {name: tuple(g.shape) for name, g in gains.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"gains have different shapes: {shapes}")
    first = next(iter(gains))
    runs = [(name, seeds[0]) for name in gains] + [(first, seed) for seed in seeds[1:]]
    settings = {"heads": False, **settings}
    maps = {(n, s): coordinate_map(gains[n], seed=s, **settings) for n, s in runs}
    sets = {key: set(m.universal_units) for key, m in maps.items()}
    pairs = []
    for a, b in combinations(runs, 2):
        union = sets[a] | sets[b]
        rows = centred_rows(maps[a].profiles), centred_rows(maps[b].profiles)
        pairs.append(
            {
                "a": list(a),
                "b": list(b),
                "universal_jaccard": len(sets[a] & sets[b]) / len(union) if union else 1.0,
                "same_layer_correlation": float((rows[0] * rows[1]).sum(1).mean()),
            }
        )
    return Stability(
        texts=[
            {
                "text": name,
                "seed": seed,
                "answer": m.answer,
                "universal_units": list(m.universal_units),
                **m.summary(),
            }
            for (name, seed), m in maps.items()
        ],
        pairs=pairs,
        core=tuple(sorted(int(u) for u in set.intersection(*sets.values()))),
        ever=tuple(sorted(int(u) for u in set.union(*sets.values()))),
    )
