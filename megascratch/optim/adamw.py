"""AdamW on flat tensors (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megascratch import ops
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
        self,
        value: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        *,
        step: int,
        lr: float,
        decay: bool,
        grad_factor: float = 1.0,
        model: Tensor | None = None,
    ) -> None:
        """Update `value` and `state` in place, in one pass over memory.

        Args:
            value: [n], in float32 or float64.
            grad: [n], the same dtype; times `grad_factor` it is final (averaged and clipped).
            state: `exp_avg` and `exp_avg_sq`, [n] each.
            step: number of this update, from 1.
            lr: learning rate.
            decay: whether weight decay applies.
            grad_factor: multiplies the gradient, which is not changed.
            model: [n] in half precision, to get the new values rounded; None where `value` is the model's own.
        """
        ops.adamw(
            value,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay if decay else 0.0,
            grad_factor=grad_factor,
            model=model,
        )
