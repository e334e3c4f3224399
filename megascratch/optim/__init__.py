"""From accumulated gradients to updated parameters: buckets, ZeRO, clipping, update rules, schedules."""

from megascratch.optim.buckets import Unit
from megascratch.optim.groups import is_frozen, require_names
from megascratch.optim.loss_scale import LossScale
from megascratch.optim.optimizer import Optimizer, StatePart, StepResult
from megascratch.optim.overlap import BUCKETS_UNDER_WAY
from megascratch.optim.precision import Precision
from megascratch.optim.schedule import learning_rate
from megascratch.optim.tree import leaf_length

__all__ = [
    "BUCKETS_UNDER_WAY",
    "LossScale",
    "Optimizer",
    "Precision",
    "StatePart",
    "StepResult",
    "Unit",
    "is_frozen",
    "leaf_length",
    "learning_rate",
    "require_names",
]
