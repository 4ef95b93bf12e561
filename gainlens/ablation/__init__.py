"""Which key dimensions to cut, and what to put in their place."""

from gainlens.ablation.ablate import AblationHooks, ablate, ablation_hooks
from gainlens.ablation.mask import KeyMask

__all__ = ["AblationHooks", "KeyMask", "ablate", "ablation_hooks"]
