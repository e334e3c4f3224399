"""What an update rule is: it owns the runs of some buckets, and moves their values by their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from megascratch.config import OptimConfig
from megascratch.dist.mesh import Mesh
from megascratch.ops.adamw import halves_of, joined
from megascratch.optim.buckets import Bucket, host_copy
from megascratch.optim.precision import Precision


@dataclass(eq=False)
class OwnedRun:
    """What this rank updates of one bucket: values in full precision, and a rule's state beside them.

    Attributes:
        bucket: whose run it is.
        values: [run], what a rule updates: a copy where it is wider than the model, or lies elsewhere, else the run
            itself. With a remainder, the model's run.
        state: one [run] for each of the rule's `state_names`, beside the master values.
        offloaded: whether they are in host memory, and the model's run is not.
        remainder: [run] int16, what the model's bfloat16 values lack of the master values; None where those are whole.
    """

    bucket: Bucket
    values: Tensor
    state: dict[str, Tensor]
    offloaded: bool = False
    remainder: Tensor | None = None
    _whole: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(
        cls, bucket: Bucket, state_names: tuple[str, ...], precision: Precision, offload: bool = False
    ) -> "OwnedRun":
        """Take the master values from the model, with a state of zeros.

        Args:
            precision: in which both are kept.
            offload: whether they are kept in host memory. A run that is there itself has them there anyway.
        """
        run, dtype = bucket.run, precision.values
        offloaded = offload and not bucket.is_on_host
        if precision.in_halves:
            values, remainder = run, torch.zeros_like(run, dtype=torch.int16)
        else:
            values, remainder = host_copy(run, dtype) if offloaded else run.to(dtype), None  # no copy of equal dtypes
        state = {name: torch.zeros_like(values, dtype=precision.state_dtype(name)) for name in state_names}
        return cls(bucket, values, state, offloaded, remainder)

    @property
    def master(self) -> Tensor:
        """The master values [run]. Those in halves are joined here for a checkpoint, and kept until the next step or
        `publish`, so that it can write into them."""
        if self.remainder is None:
            return self.values
        if self._whole is None:
            self._whole = joined(self.values, self.remainder)
        return self._whole

    def forget_whole(self) -> None:
        """Let go of master values that were joined from halves."""
        self._whole = None

    @property
    def has_master(self) -> bool:
        """Whether the master values say more than the model's."""
        return self.remainder is not None or self.values.dtype != self.bucket.run.dtype

    @property
    def model(self) -> Tensor | None:
        """The model's values of the run, to get the new ones as they are made; None where they are the master's own, or
        `publish` brings them."""
        return self.bucket.run if self.has_master and not self.offloaded and self.remainder is None else None

    def refresh(self) -> None:
        """Take the master values from the model."""
        if self.remainder is None:
            self.values.copy_(self.bucket.run)
        else:
            self.remainder.zero_()
            self.forget_whole()

    def publish(self) -> None:
        """Give the model the master values."""
        if self.remainder is None:
            # The next update changes them after its gradients have come, which the stream brings after this copy.
            self.bucket.run.copy_(self.values, non_blocking=True)
        else:
            for half, made in zip((self.values, self.remainder), halves_of(self.master)):
                half.copy_(made)
            self.forget_whole()


class Update(NamedTuple):
    """What a rule is told of a step: scalars on the device, which it does not ask for their values.

    Attributes:
        number: of this update, from 1.
        lr: learning rate.
        grad_factor: multiplies the gradients, which are not changed: it averages and clips them.
        taken: whether there is an update. Where it is false nothing may change, whatever the gradients hold.
    """

    number: Tensor
    lr: Tensor
    grad_factor: Tensor
    taken: Tensor


class UpdateRule(Protocol):
    """A rule with the runs that it moves. Every rank makes it, and updates, at the same point."""

    state_names: ClassVar[tuple[str, ...]]

    def __init__(self, optim: OptimConfig, runs: Sequence[OwnedRun], mesh: Mesh) -> None: ...

    def update(self, grads: Sequence[Tensor], now: Update) -> None:
        """Move the values, in place.

        Args:
            grads: of each run, on the model's device.
            now: what the step is.
        """
        ...
