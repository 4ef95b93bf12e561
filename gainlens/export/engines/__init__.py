"""Writers of checkpoints, one row per engine in ``ENGINES``."""

from __future__ import annotations

from gainlens.errors import InputError
from gainlens.export.engines.base import Engine, EngineLimitError
from gainlens.export.engines.llama_cpp import LlamaCppEngine
from gainlens.export.engines.own import GainlensEngine
from gainlens.export.engines.stock import TransformersEngine, VllmEngine

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (GainlensEngine(), TransformersEngine(), VllmEngine(), LlamaCppEngine())
}

__all__ = ["ENGINES", "Engine", "EngineLimitError", "get_engine"]


def get_engine(name: str) -> Engine:
    """The row called ``name``.

    Raises:
        InputError: there is none.
    """
    engine = ENGINES.get(name)
    if engine is None:
        raise InputError(f"engine={name!r} is not one of {', '.join(ENGINES)}")
    return engine
