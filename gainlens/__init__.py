"""gainlens: what the key dimensions of a transformer do, which can go, and what that is worth."""

import gainlens.starting  # noqa: F401  first: it answers Ctrl-C while the rest is imported
from gainlens.ablation import (
    Cut,
    KeyCache,
    KeyMask,
    RefitCut,
    ablate,
    ablation_hooks,
    best_cut,
    greedy_mask,
    load_cut,
    refit,
)
from gainlens.analysis import (
    Behaviours,
    CoordinateMap,
    PatchEffects,
    SurgeryCurve,
    Verdict,
    attribution_patching,
    behaviours,
    canonical_gains,
    compare_maps,
    coordinate_map,
    patch_keys,
    surgery,
    with_evidence,
)
from gainlens.errors import (
    FileFormatError,
    GainlensError,
    InputError,
    SilentSiteError,
    UnsupportedModelError,
)
from gainlens.export import SlicePlan, export_model, load_slim, sliced_attention, slim
from gainlens.model import KeySites, key_sites, load_model, load_tokens
from gainlens.probes import KeyGainProbe, KeyGains, probe_gains
from gainlens.training import TrainingError, TrainingRun, train_virtual_width

__version__ = "0.1.0"

__all__ = [
    "Behaviours",
    "CoordinateMap",
    "Cut",
    "FileFormatError",
    "GainlensError",
    "InputError",
    "KeyCache",
    "KeyGainProbe",
    "KeyGains",
    "KeyMask",
    "KeySites",
    "PatchEffects",
    "RefitCut",
    "SilentSiteError",
    "SlicePlan",
    "SurgeryCurve",
    "TrainingError",
    "TrainingRun",
    "UnsupportedModelError",
    "Verdict",
    "ablate",
    "ablation_hooks",
    "attribution_patching",
    "behaviours",
    "best_cut",
    "canonical_gains",
    "compare_maps",
    "coordinate_map",
    "export_model",
    "greedy_mask",
    "key_sites",
    "load_cut",
    "load_model",
    "load_slim",
    "load_tokens",
    "patch_keys",
    "probe_gains",
    "refit",
    "sliced_attention",
    "slim",
    "surgery",
    "train_virtual_width",
    "with_evidence",
]
