"""One optimizer step over all buckets of a rank: reduce, measure, clip, update, publish.

    micro-batches ─ grads (sums) ─ reduce over grad_axes and data ─ global norm ─ clip ─ update own run ─ publish values

Updates happen on `master` values: a float32 copy of the run where the model is in 16 bits, the run itself elsewhere.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import OptimConfig
from megascratch.dist import comm
from megascratch.dist.layout import Extent, ParamSpec, run_extents
from megascratch.dist.mesh import Mesh
from megascratch.optim.adamw import AdamW
from megascratch.optim.buckets import make_buckets

RULES = {"adamw": AdamW}


@dataclass(frozen=True)
class StepResult:
    """What a step did: the global gradient norm before clipping, and whether the update was skipped."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class StatePart:
    """This rank's run of one parameter's optimizer state, for checkpoints.

    Attributes:
        kind: "master", or a name from the rule's `state_names`.
        spec: the parameter.
        tensor: the run, one-dimensional.
        extents: where the run lies in the parameter's logical tensor.
        counts: whether this rank's copy is the one to save.
    """

    kind: str
    spec: ParamSpec
    tensor: Tensor
    extents: list[Extent]
    counts: bool


class Optimizer:
    """All buckets of this rank, with the update rule and its state.

    Args:
        params: of all stages on this rank, initialised.
        mesh: this rank's place.
        optim: hyperparameters.
        zero: ZeRO stage, 0 or 1.
    """

    def __init__(self, params: Iterable[nn.Parameter], mesh: Mesh, optim: OptimConfig, zero: int) -> None:
        self.mesh, self.clip = mesh, optim.clip
        self.rule = RULES[optim.name](optim)
        self.buckets = make_buckets(params, mesh, zero, optim.bucket_numel)
        self.state = [
            {name: torch.zeros_like(bucket.grads[bucket.start : bucket.stop]) for name in self.rule.state_names}
            for bucket in self.buckets
        ]
        self.masters = [bucket.run.to(bucket.grads.dtype) for bucket in self.buckets]  # no copy where dtypes agree
        self.updates = 0

    def zero_grads(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self.buckets:
            bucket.grads.zero_()

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> StepResult:
        """Update every parameter from the accumulated gradients.

        Args:
            lr: learning rate.
            grad_scale: factor that turns accumulated sums into the gradient of the mean loss.

        Returns: the norm of the scaled gradient. A norm that is not finite skips the update, on every rank alike.
        """
        reduced = [bucket.reduced_grads() for bucket in self.buckets]
        norm = self._global_norm(reduced) * grad_scale
        if not math.isfinite(norm):
            return StepResult(norm, skipped=True)
        factor = grad_scale * (min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0)
        self.updates += 1
        for bucket, grad, state, master in zip(self.buckets, reduced, self.state, self.masters):
            self.rule.update(
                master,
                grad,
                state,
                step=self.updates,
                lr=lr,
                decay=bucket.key.decay,
                grad_factor=factor,
                model=bucket.run if master.data_ptr() != bucket.run.data_ptr() else None,
            )
            bucket.publish()
        return StepResult(norm, skipped=False)

    def _global_norm(self, reduced: list[Tensor]) -> float:
        """Return the norm over every logical parameter once, whatever the layout replicates."""
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for bucket, grad in zip(self.buckets, reduced):
            if bucket.counts:
                squares += ops.squared_norm(grad)
        return math.sqrt(comm.sum_over(squares, self.mesh.world).item())

    def state_parts(self) -> Iterator[StatePart]:
        """Yield this rank's part of the optimizer state of every parameter that it updates."""
        for bucket, state, master in zip(self.buckets, self.state, self.masters):
            tensors = dict(state)
            if master.data_ptr() != bucket.run.data_ptr():
                tensors["master"] = master
            for span in bucket.spans:
                first, last = max(span.start, bucket.start), min(span.stop, bucket.stop)
                if first >= last:
                    continue
                place = run_extents(
                    span.spec, self.mesh.spec.sizes, self.mesh.coords, first - span.start, last - span.start
                )
                run = slice(first - bucket.start, last - bucket.start)
                for kind, tensor in tensors.items():
                    yield StatePart(kind, span.spec, tensor[run], place, bucket.counts)

    def refresh_masters(self) -> None:
        """Take the master values from the model's, after weights were loaded without optimizer state."""
        for bucket, master in zip(self.buckets, self.masters):
            master.copy_(bucket.run)

    def publish_masters(self) -> None:
        """Give the model the master values, after state was loaded."""
        for bucket, master in zip(self.buckets, self.masters):
            bucket.run.copy_(master)
            bucket.publish()
