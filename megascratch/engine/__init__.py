"""The engine and the one training loop, shared by pretraining and every alignment method."""

from megascratch.engine.engine import Engine, StepReport
from megascratch.engine.objective import Loss, Measure, Objective, Outputs, Ratio, next_token, with_ahead
from megascratch.engine.pretrain import open_datasets, pretrain, pretraining
from megascratch.engine.task import Begin, Method, Source, Task, Validation, valid_loss
from megascratch.engine.totals import Totals
from megascratch.engine.train import train, train_on
from megascratch.engine.trainer import Trainer

__all__ = [
    "Begin",
    "Engine",
    "Loss",
    "Measure",
    "Method",
    "Objective",
    "Outputs",
    "Ratio",
    "Source",
    "StepReport",
    "Task",
    "Totals",
    "Trainer",
    "Validation",
    "next_token",
    "open_datasets",
    "pretrain",
    "pretraining",
    "train",
    "train_on",
    "valid_loss",
    "with_ahead",
]
