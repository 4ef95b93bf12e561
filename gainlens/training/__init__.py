"""Virtual width: training only the active units of a full-width model, and healing a cut."""

from gainlens.training.processes import Processes, gather_gains
from gainlens.training.rounds import nested_plans
from gainlens.training.run import TrainingRun
from gainlens.training.settings import Settings
from gainlens.training.trainer import TrainingError
from gainlens.training.virtual_width import train_virtual_width

__all__ = [
    "Processes",
    "Settings",
    "TrainingError",
    "TrainingRun",
    "gather_gains",
    "nested_plans",
    "train_virtual_width",
]
