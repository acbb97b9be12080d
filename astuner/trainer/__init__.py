"""The training loop over a Policy: batches, updates, schedule, checkpoints and resume."""

from astuner.trainer.checkpoints import Checkpoint, Checkpoints, TrainerState
from astuner.trainer.loop import train
from astuner.trainer.seams import EvalResult, GroupSource, Progress, TrainResult
from astuner.trainer.settings import TrainSettings
from astuner.trainer.totals import Totals

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "EvalResult",
    "GroupSource",
    "Progress",
    "Totals",
    "TrainResult",
    "TrainSettings",
    "TrainerState",
    "train",
]
