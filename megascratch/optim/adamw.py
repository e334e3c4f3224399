"""AdamW on the runs of buckets (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

Where master values and state are kept in host memory the processor updates them there: of each bucket the gradient
comes down and the new values go up, and the device holds neither (Ren et al. 2021, arXiv:2101.06840, section 4).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megascratch import ops
from megascratch.config import OptimConfig
from megascratch.dist.mesh import Mesh
from megascratch.optim.rule import OwnedRun, Update


class AdamW:
    """AdamW: elementwise, so that any run is updated where it lies, in one pass over memory.

    Args:
        optim: `beta1`, `beta2` and `eps` are read.
        runs: what this rank updates.
        mesh: not needed.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, optim: OptimConfig, runs: Sequence[OwnedRun], mesh: Mesh) -> None:
        self.optim, self.runs = optim, runs

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], now: Update) -> None:
        """Update values and state in place; see `UpdateRule`."""
        optim = self.optim
        step = ops.adamw_step(now.lr, now.number, now.grad_factor, now.taken, beta1=optim.beta1, beta2=optim.beta2)
        for run, grad in zip(self.runs, grads):
            ops.adamw(
                run.values,
                grad.to(run.values.device),
                run.state["exp_avg"],
                run.state["exp_avg_sq"],
                step.to(run.values.device),
                beta1=optim.beta1,
                beta2=optim.beta2,
                eps=optim.eps,
                weight_decay=run.bucket.key.pace.weight_decay,
                lr_scale=run.bucket.key.pace.lr_scale,
                model=run.model,
                remainder=run.remainder,
            )
            if run.offloaded:
                run.publish()
