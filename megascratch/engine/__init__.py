"""The engine and the one training loop, shared by pretraining and every alignment method."""

from megascratch.engine.engine import Engine, StepReport, Totals
from megascratch.engine.objective import Loss, Objective, Outputs, next_token
from megascratch.engine.pretrain import open_datasets, pretrain
from megascratch.engine.trainer import Trainer

__all__ = [
    "Engine",
    "Loss",
    "Objective",
    "Outputs",
    "StepReport",
    "Totals",
    "Trainer",
    "next_token",
    "open_datasets",
    "pretrain",
]
