"""A step of an optimizer that has gradients and no engine."""

import torch

from megascratch.optim import Optimizer


def take_step(optimizer: Optimizer, lr: float, grad_scale: float = 1.0) -> tuple[float, bool]:
    """Update from the gradients that were added up; returns their norm, scaled, and whether the step was taken."""
    optimizer.begin_step(lr)
    scale, loss = torch.tensor([grad_scale, 0.0], dtype=torch.float64, device=optimizer.mesh.device)
    norm, taken = optimizer.step(scale, loss)
    optimizer.end_step(bool(taken))
    return norm.item(), bool(taken)
