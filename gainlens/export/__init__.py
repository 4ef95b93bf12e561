"""Physically smaller models from cuts, and checkpoints of them for stock engines."""

from gainlens.export.attention import sliced_attention
from gainlens.export.canonical import canonical_plan
from gainlens.export.engines import ENGINES, EngineLimitError
from gainlens.export.modeling import plan_of, register_auto_classes
from gainlens.export.plan import SlicePlan
from gainlens.export.slim_model import Parity, load_slim, slim
from gainlens.export.writing import ParityError, export_model

register_auto_classes()

__all__ = [
    "ENGINES",
    "EngineLimitError",
    "Parity",
    "ParityError",
    "SlicePlan",
    "canonical_plan",
    "export_model",
    "load_slim",
    "plan_of",
    "sliced_attention",
    "slim",
]
