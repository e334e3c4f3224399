"""What the host decides anew for every step, where the device reads it.

A step is queued without a word from the device to the host, and may be a recording that is replayed: numbers that
Python would compute with are fixed in it for ever. So those that change lie in memory, written before the step begins:

    host      lr = 3e-4, update 7, …  ─ write ─┐                              ┌─ read: norm, taken or not
    device                                      [4] ─ forward ─ backward ─ norm ─ update where taken
"""

import math

import torch


class StepInputs:
    """Float64 scalars on the device, at the same place in every step.

    Attributes:
        lr: learning rate.
        number: of the update to be, from 1.
        loss_scale: factor on the loss, which the gradients have too.
        loss_limit: a step whose loss is larger is not taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._all = torch.zeros(4, dtype=torch.float64, device=device)
        self.lr, self.number, self.loss_scale, self.loss_limit = self._all.unbind()

    def write(self, lr: float, number: int, loss_scale: float = 1.0, loss_limit: float = math.inf) -> None:
        """Set them for the step that is next; the last one must have been read."""
        self._all.copy_(torch.tensor([lr, number, loss_scale, loss_limit], dtype=torch.float64))
