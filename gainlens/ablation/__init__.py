"""Which key dimensions to cut, and what to put in their place."""

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut, HeadMaps
from gainlens.ablation.greedy_cut import greedy_mask
from gainlens.ablation.hooks import ablate, ablation_hooks
from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.kinds import CUTS, load_cut
from gainlens.ablation.least_squares_refit import refit
from gainlens.ablation.masked_cut import MaskedCut
from gainlens.ablation.recipe import best_cut
from gainlens.ablation.refit_cut import RefitCut
from gainlens.ablation.slot_cut import SlotCut
from gainlens.ablation.slot_fit import fit_slots

__all__ = [
    "CUTS",
    "AblationHooks",
    "Cut",
    "HeadMaps",
    "KeyCache",
    "KeyMask",
    "MaskedCut",
    "RefitCut",
    "SlotCut",
    "ablate",
    "ablation_hooks",
    "best_cut",
    "fit_slots",
    "greedy_mask",
    "load_cut",
    "refit",
]
