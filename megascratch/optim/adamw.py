"""AdamW on flat tensors (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megascratch.config import OptimConfig


class AdamW:
    """The update rule; it holds hyperparameters, and every tensor is handed to it.

    Args:
        optim: `beta1`, `beta2`, `eps` and `weight_decay` are read.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, optim: OptimConfig) -> None:
        self.beta1, self.beta2, self.eps, self.weight_decay = optim.beta1, optim.beta2, optim.eps, optim.weight_decay

    @torch.no_grad()
    def update(
        self, value: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, step: int, lr: float, decay: bool
    ) -> None:
        """Update `value` and `state` in place.

        Args:
            value: [n], in float32 or float64.
            grad: [n], the same dtype, final (averaged and clipped).
            state: `exp_avg` and `exp_avg_sq`, [n] each.
            step: number of this update, from 1.
            lr: learning rate.
            decay: whether weight decay applies.
        """
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        if decay:
            value.mul_(1.0 - lr * self.weight_decay)
        exp_avg.lerp_(grad, 1.0 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1.0 - self.beta2)
        root = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - self.beta2**step)).add_(self.eps)
        value.addcdiv_(exp_avg, root, value=-lr / (1.0 - self.beta1**step))
