"""What breaks when key dimensions go, and whether layers share them."""

from gainlens.analysis.behaviours import Behaviours, behaviours
from gainlens.analysis.coordinates import CoordinateMap, coordinate_map
from gainlens.analysis.curve import SurgeryCurve
from gainlens.analysis.map_canonical import canonical_gains
from gainlens.analysis.map_compare import compare_maps
from gainlens.analysis.map_evidence import with_evidence
from gainlens.analysis.patching import PatchEffects, attribution_patching, patch_keys
from gainlens.analysis.surgery import surgery
from gainlens.analysis.verdict import Verdict

__all__ = [
    "Behaviours",
    "CoordinateMap",
    "PatchEffects",
    "SurgeryCurve",
    "Verdict",
    "attribution_patching",
    "behaviours",
    "canonical_gains",
    "compare_maps",
    "coordinate_map",
    "patch_keys",
    "surgery",
    "with_evidence",
]
