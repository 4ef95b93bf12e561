"""Which key dimensions to cut, and what to put in their place."""

from gainlens.ablation.ablate import AblationHooks, ablate, ablation_hooks
from gainlens.ablation.cache import KeyCache
from gainlens.ablation.greedy import greedy_mask
from gainlens.ablation.mask import KeyMask
from gainlens.ablation.refit import RefitCut, refit

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
