"""gainlens: measure a transformer's key dimensions, cut the unneeded ones, export the result."""

from typing import Any

import gainlens.starting  # noqa: F401  first: it answers Ctrl-C while the rest is imported
from gainlens.ablation import Cut, KeyMask, ablate, ablation_hooks, best_cut, load_cut
from gainlens.analysis import (
    CoordinateMap,
    SurgeryCurve,
    Verdict,
    behaviours,
    coordinate_map,
    patch_keys,
    surgery,
)
from gainlens.errors import GainlensError
from gainlens.export import SlicePlan, export_model, load_slim, sliced_attention, slim
from gainlens.model import load_model, load_tokens
from gainlens.probes import KeyGainProbe, KeyGains, probe_gains
from gainlens.training import train_virtual_width

__version__ = "0.1.0"

__all__ = [
    "CoordinateMap",
    "Cut",
    "GainlensError",
    "KeyGainProbe",
    "KeyGains",
    "KeyMask",
    "SlicePlan",
    "SurgeryCurve",
    "Verdict",
    "ablate",
    "ablation_hooks",
    "behaviours",
    "best_cut",
    "coordinate_map",
    "export_model",
    "load_cut",
    "load_model",
    "load_slim",
    "load_tokens",
    "patch_keys",
    "probe_gains",
    "sliced_attention",
    "slim",
    "surgery",
    "train_virtual_width",
]

_ONE_LEVEL_DOWN = {
    "ablation": ("KeyCache", "RefitCut", "greedy_mask", "refit"),
    "analysis": (
        "Behaviours",
        "PatchEffects",
        "attribution_patching",
        "canonical_gains",
        "compare_maps",
        "with_evidence",
    ),
    "errors": ("FileFormatError", "InputError", "SilentSiteError", "UnsupportedModelError"),
    "model": ("KeySites", "key_sites"),
    "training": ("TrainingError", "TrainingRun"),
}


def __getattr__(name: str) -> Any:
    """Resolve names that older notebooks import from the top level; they moved one level down."""
    from importlib import import_module

    for room, names in _ONE_LEVEL_DOWN.items():
        if name in names:
            return getattr(import_module(f"gainlens.{room}"), name)
    raise AttributeError(f"module 'gainlens' has no attribute {name!r}")
