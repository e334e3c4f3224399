"""The value that the engine consumes: one microbatch of one data-parallel rank."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """`b` samples of `s` tokens.

    Attributes:
        tokens: inputs, [b, s] int64.
        labels: the token that follows each input, [b, s] int64.
        loss_mask: 1 where the loss counts, [b, s] float32.
        position_ids: of the inputs, [b, s] int64.
        sample_ids: index of each sample in the whole run, [b] int64; the sample log and layout-independent dropout
            depend on it.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device | str) -> "Microbatch":
        """Return the microbatch on a device."""
        return Microbatch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.loss_mask.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.sample_ids.to(device, non_blocking=True),
        )
