"""From accumulated gradients to updated parameters: buckets, ZeRO, clipping, update rules, schedules."""

from megascratch.optim.loss_scale import LossScale
from megascratch.optim.optimizer import Optimizer, StatePart, StepResult
from megascratch.optim.schedule import learning_rate

__all__ = ["LossScale", "Optimizer", "StatePart", "StepResult", "learning_rate"]
