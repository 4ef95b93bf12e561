"""The effect of cutting key dimensions, and whether layers share them."""

from gainlens.analysis.behaviour_curves import Behaviours, behaviours
from gainlens.analysis.damage_by_distance import DistanceChange, change_by_distance
from gainlens.analysis.damage_by_position import PositionRise, rise_by_position
from gainlens.analysis.map.canonical import canonical_gains
from gainlens.analysis.map.comparison import compare_maps
from gainlens.analysis.map.coordinates import CoordinateMap, coordinate_map
from gainlens.analysis.map.evidence import with_evidence
from gainlens.analysis.map.universality import UniversalityPrice, price_of_universality
from gainlens.analysis.patch_effects import PatchEffects
from gainlens.analysis.patching import attribution_patching, patch_keys
from gainlens.analysis.sweep.curve import SurgeryCurve
from gainlens.analysis.sweep.run import surgery
from gainlens.analysis.task_running import score_tasks
from gainlens.analysis.task_scores import TaskScores
from gainlens.stats.verdicts import Verdict

__all__ = [
    "Behaviours",
    "CoordinateMap",
    "DistanceChange",
    "PatchEffects",
    "PositionRise",
    "SurgeryCurve",
    "TaskScores",
    "UniversalityPrice",
    "Verdict",
    "attribution_patching",
    "behaviours",
    "canonical_gains",
    "change_by_distance",
    "compare_maps",
    "coordinate_map",
    "patch_keys",
    "price_of_universality",
    "rise_by_position",
    "score_tasks",
    "surgery",
    "with_evidence",
]
