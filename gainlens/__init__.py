"""gainlens: what the key dimensions of a transformer do, which can go, and what that is worth."""

from gainlens.ablation import KeyMask, ablate, ablation_hooks
from gainlens.analysis import CoordinateMap, SurgeryCurve, Verdict, coordinate_map, surgery
from gainlens.errors import (
    FileFormatError,
    GainlensError,
    InputError,
    SilentSiteError,
    UnsupportedModelError,
)
from gainlens.model import KeySites, key_sites, load_model, load_tokens
from gainlens.probes import KeyGainProbe, KeyGains, probe_gains

__version__ = "0.1.0"

__all__ = [
    "CoordinateMap",
    "FileFormatError",
    "GainlensError",
    "InputError",
    "KeyGainProbe",
    "KeyGains",
    "KeyMask",
    "KeySites",
    "SilentSiteError",
    "SurgeryCurve",
    "UnsupportedModelError",
    "Verdict",
    "ablate",
    "ablation_hooks",
    "coordinate_map",
    "key_sites",
    "load_model",
    "load_tokens",
    "probe_gains",
    "surgery",
]
