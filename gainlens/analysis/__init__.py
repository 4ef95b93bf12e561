"""What breaks when key dimensions go, and whether layers share them."""

from gainlens.analysis.coordinates import CoordinateMap, coordinate_map
from gainlens.analysis.curve import SurgeryCurve
from gainlens.analysis.surgery import surgery
from gainlens.analysis.verdict import Verdict

__all__ = ["CoordinateMap", "SurgeryCurve", "Verdict", "coordinate_map", "surgery"]
