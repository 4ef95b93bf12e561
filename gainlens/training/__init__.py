"""Virtual width: training only the active units of a full-width model, and healing a cut."""

from gainlens.training.processes import Processes, gather_gains
from gainlens.training.run import TrainingRun
from gainlens.training.settings import Settings
from gainlens.training.train import TrainingError, train_virtual_width

__all__ = [
    "Processes",
    "Settings",
    "TrainingError",
    "TrainingRun",
    "gather_gains",
    "train_virtual_width",
]
