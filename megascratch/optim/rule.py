"""What an update rule is: it owns the runs of some buckets, and moves their values by their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megascratch.config import OptimConfig
from megascratch.dist.mesh import Mesh
from megascratch.optim.buckets import Bucket, host_copy


@dataclass(frozen=True)
class OwnedRun:
    """What this rank updates of one bucket: values in full precision, and a rule's state beside them.

    Attributes:
        bucket: whose run it is.
        master: [run] in the dtype of the bucket's gradients: a copy where the model is in another, or lies elsewhere,
            else the run itself.
        state: one [run] for each of the rule's `state_names`, beside the master values.
        offloaded: whether they are in host memory, and the model's run is not.
    """

    bucket: Bucket
    master: Tensor
    state: dict[str, Tensor]
    offloaded: bool = False

    @classmethod
    def of(cls, bucket: Bucket, state_names: tuple[str, ...], offload: bool = False) -> "OwnedRun":
        """Take the master values from the model, with a state of zeros.

        Args:
            offload: whether both are kept in host memory. A run that is there itself has them there anyway.
        """
        run, dtype = bucket.run, bucket.grads.dtype
        offloaded = offload and not bucket.is_on_host
        master = host_copy(run, dtype) if offloaded else run.to(dtype)  # no copy where dtypes agree
        return cls(bucket, master, {name: torch.zeros_like(master) for name in state_names}, offloaded)

    @property
    def has_master(self) -> bool:
        """Whether the master values say more than the model's."""
        return self.bucket.run.dtype != self.master.dtype

    @property
    def model(self) -> Tensor | None:
        """The model's values of the run, to get the new ones as they are made; None where they are the master's own, or
        `publish` brings them."""
        return self.bucket.run if self.has_master and not self.offloaded else None

    def refresh(self) -> None:
        """Take the master values from the model."""
        self.master.copy_(self.bucket.run)

    def publish(self) -> None:
        """Give the model the master values."""
        # The next update changes them after its gradients have come, which the stream brings after this copy.
        self.bucket.run.copy_(self.master, non_blocking=True)


class UpdateRule(Protocol):
    """A rule with the runs that it moves. Every rank makes it, and updates, at the same point."""

    state_names: ClassVar[tuple[str, ...]]

    def __init__(self, optim: OptimConfig, runs: Sequence[OwnedRun], mesh: Mesh) -> None: ...

    def update(self, grads: Sequence[Tensor], *, step: int, lr: float, grad_factor: float) -> None:
        """Move the values, in place.

        Args:
            grads: of each run, on the model's device and in the dtype of its master; times `grad_factor` they are final
                (averaged and clipped).
            step: number of this update, from 1.
            lr: learning rate.
            grad_factor: multiplies the gradients, which are not changed.
        """
        ...
