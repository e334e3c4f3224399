"""What an update rule is: it owns the runs of some buckets, and moves their values by their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megascratch.config import OptimConfig
from megascratch.dist.mesh import Mesh
from megascratch.optim.buckets import Bucket


@dataclass(frozen=True)
class OwnedRun:
    """What this rank updates of one bucket: values in full precision, and a rule's state beside them.

    Attributes:
        bucket: whose run it is.
        master: [run] in the dtype of the bucket's gradients: a copy where the model is in another, else the run itself.
        state: one [run] for each of the rule's `state_names`.
    """

    bucket: Bucket
    master: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, bucket: Bucket, state_names: tuple[str, ...]) -> "OwnedRun":
        """Take the master values from the model, with a state of zeros."""
        dtype = bucket.grads.dtype
        master = bucket.run.to(dtype)  # no copy where dtypes agree
        return cls(bucket, master, {name: torch.zeros_like(master) for name in state_names})

    @property
    def model(self) -> Tensor | None:
        """The model's 16-bit values of the run, to get the new ones rounded; None where `master` is the model's own."""
        return self.bucket.run if self.bucket.run.dtype != self.master.dtype else None


class UpdateRule(Protocol):
    """A rule with the runs that it moves. Every rank makes it, and updates, at the same point."""

    state_names: ClassVar[tuple[str, ...]]

    def __init__(self, optim: OptimConfig, runs: Sequence[OwnedRun], mesh: Mesh) -> None: ...

    def update(self, grads: Sequence[Tensor], *, step: int, lr: float, grad_factor: float) -> None:
        """Move the values, in place.

        Args:
            grads: of each run, in the dtype of its master; times `grad_factor` they are final (averaged and clipped).
            step: number of this update, from 1.
            lr: learning rate.
            grad_factor: multiplies the gradients, which are not changed.
        """
        ...
