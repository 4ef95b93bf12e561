"""Which key dimensions to cut, and what to put in their place."""

from gainlens.ablation.greedy_cut import greedy_mask
from gainlens.ablation.hooks import AblationHooks, ablate, ablation_hooks
from gainlens.ablation.key_cache import KeyCache
from gainlens.ablation.key_mask import KeyMask
from gainlens.ablation.refit_cut import RefitCut, refit

__all__ = [
    "AblationHooks",
    "KeyCache",
    "KeyMask",
    "RefitCut",
    "ablate",
    "ablation_hooks",
    "greedy_mask",
    "refit",
]
