"""In which dtypes the optimizer keeps what it has of a parameter: Megatron-LM's precision-aware optimizer.

By hand, bytes a parameter of a bfloat16 model, its own weight the first of them:

    [optim]                                             weight   float32 weight   sum of gradients   averages
    –                                                     2            4                 4            4 + 4     18
    master_remainders                                     2            2                 4            4 + 4     16
    master_remainders, averages in bf16                   2            2                 4            2 + 2     12
    master_remainders, averages and gradients in bf16     2            2                 2            2 + 2     10
    master_weights = false                                2            –                 2            2 + 2      8

An update is computed in float32, from numbers that are widened as they are read and rounded once as they are written. A
sum of gradients in bfloat16 is rounded with every micro-batch, and travels between ranks in it, as Megatron-LM's does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megascratch import ops
from megascratch.config import OptimConfig


@dataclass(frozen=True)
class Precision:
    """What is kept of each parameter beside the model's value.

    Attributes:
        values: dtype of what is updated: the model's own, or a wider copy.
        in_halves: whether of such a copy only what the model's bfloat16 value lacks is kept.
        grads: dtype in which gradients are summed, over micro-batches and over ranks.
        averages: dtypes of a rule's state by name; what is not here is in the values'.
    """

    values: torch.dtype
    in_halves: bool
    grads: torch.dtype
    averages: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, optim: OptimConfig, model: torch.dtype) -> "Precision":
        """Return what a recipe asks for beside a model of this dtype; fp32 stands for float64 in a float64 model."""
        wide = ops.acc_dtype(torch.empty((), dtype=model))
        values = wide if optim.master_weights else model
        named = {None: values, "fp32": wide, "bf16": torch.bfloat16}
        averages = {"exp_avg": named[optim.exp_avg_dtype], "exp_avg_sq": named[optim.exp_avg_sq_dtype]}
        in_halves = optim.master_remainders and model == torch.bfloat16
        return cls(values, in_halves, named[optim.main_grads_dtype], averages)

    def state_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a rule's state."""
        return self.averages.get(name, self.values)
