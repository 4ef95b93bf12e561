"""Plug-in of vLLM that serves slim folders of gainlens.

vLLM calls ``register`` in each of its processes. Only ``register`` and the modules ``attention``,
``backend`` and ``models`` import vLLM.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Make slim configurations known to transformers, and slim models to vLLM."""
    from vllm import ModelRegistry

    from gainlens_vllm.configs import register_configs
    from gainlens_vllm.families import FAMILIES

    register_configs()
    for family in FAMILIES:
        ModelRegistry.register_model(family.architecture, f"gainlens_vllm.models.{family.model}")
