"""One optimizer step over all buckets of a rank: reduce, measure, clip, update, publish.

    micro-batches ─ grads (sums) ─ reduce over grad_axes and data ─ global norm ─ clip ─ update own run ─ publish values

Updates happen on `master` values: a float32 copy of the run where the model is in 16 bits, or the 16 bits that such
a copy has beyond the model's; the run itself elsewhere, and where the recipe does without such copies. In which dtypes
gradients and averages are beside them, `precision.py` says.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import OptimConfig, ParallelConfig
from megascratch.dist.layout import Extent, ParamSpec, run_extents
from megascratch.dist.mesh import Axis, Mesh
from megascratch.dist.sums import exact_sum
from megascratch.optim.adamw import AdamW
from megascratch.optim.buckets import Bucket, Unit, make_buckets
from megascratch.optim.groups import pace_of
from megascratch.optim.inputs import StepInputs
from megascratch.optim.muon import Muon
from megascratch.optim.overlap import Overlap
from megascratch.optim.precision import Precision
from megascratch.optim.rule import OwnedRun, Update, UpdateRule

T = TypeVar("T")

# Of a rank that shares its gradients with nobody: small enough to fit into what a layer's activations leave.
_ALONE_NUMEL = 1 << 22

RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW, "muon": Muon}


def rule_of(optim: OptimConfig, spec: ParamSpec) -> str:
    """Return the key of `RULES` for a parameter: what is no matrix is AdamW's, whatever is asked for."""
    return optim.name if spec.matrices is not None else "adamw"


class StepResult(NamedTuple):
    """What a step did, scalars on the device: the gradient's global norm before clipping, and whether it was taken."""

    grad_norm: Tensor
    taken: Tensor


@dataclass(frozen=True)
class StatePart:
    """This rank's run of one parameter's values or optimizer state, for checkpoints.

    Attributes:
        kind: "weight", "master", or a name from the rule's `state_names`.
        spec: the parameter.
        tensor: the run, one-dimensional.
        extents: where the run lies in the parameter's logical tensor.
        counts: whether copies like this one are the ones to save: not those of a tied tensor, nor of other tp ranks.
        replicas: the ranks that hold the same run.
    """

    kind: str
    spec: ParamSpec
    tensor: Tensor
    extents: list[Extent]
    counts: bool
    replicas: Axis


class Optimizer:
    """All buckets of this rank, with the update rule and its state.

    Args:
        units: the parameters of all stages on this rank, initialised, in the order of the forward.
        mesh: this rank's place.
        optim: hyperparameters.
        parallel: ZeRO stage, order of sums, and what is kept in host memory.

    Attributes:
        inputs: what the step depends on besides gradients.
        overlap: to be told of what the pipeline does. Without it, `step` reduces and gathers everything itself.
        updates: how many steps were taken.
    """

    def __init__(self, units: Sequence[Unit], mesh: Mesh, optim: OptimConfig, parallel: ParallelConfig) -> None:
        self.mesh, self.clip = mesh, optim.clip
        precision_of = partial(Precision.of, optim)
        self.buckets = make_buckets(
            units,
            mesh,
            parallel,
            optim.bucket_numel if mesh.world.size > 1 else min(optim.bucket_numel, _ALONE_NUMEL),
            partial(rule_of, optim),
            partial(pace_of, optim),
            precision_of,
        )
        self.overlap = Overlap(self.buckets, units)
        self.runs = [
            OwnedRun.of(
                bucket,
                RULES[bucket.key.rule].state_names,
                precision_of(bucket.values.dtype),
                parallel.offload_optimizer,
            )
            for bucket in self.buckets
        ]
        names = sorted({bucket.key.rule for bucket in self.buckets})
        self.rules = {name: RULES[name](optim, self._of(name, self.runs), mesh) for name in names}
        self.inputs = StepInputs(mesh.device)
        self.updates = 0
        self.overlap.give_back()
        self.overlap.publish_codes()

    def begin_step(self, lr: float, loss_scale: float = 1.0, loss_limit: float = math.inf) -> None:
        """Tell the device what the next step depends on.

        Args:
            lr: learning rate.
            loss_scale: factor on the loss, which the gradients have too.
            loss_limit: a step whose loss is larger is not taken.
        """
        self.inputs.write(lr, self.updates + 1, loss_scale, loss_limit)
        for run in self.runs:
            run.forget_whole()

    def zero_grads(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self.buckets:
            bucket.zero_grads()

    @torch.no_grad()
    def step(self, grad_scale: Tensor, loss: Tensor) -> StepResult:
        """Update every parameter from the accumulated gradients, unless loss or norm are not finite or too large.

        Nothing is asked of the device, so it may be recorded. `begin_step` comes before, `end_step` after it.

        Args:
            grad_scale: factor that turns accumulated sums into the gradient of the mean loss, a scalar.
            loss: of the global batch, a scalar.

        Returns: the norm of the scaled gradient, and whether the step was taken, the same on every rank.
        """
        reduced = [bucket.reduced_grads() for bucket in self.buckets]
        norm = self._global_norm(reduced) * grad_scale
        taken = norm.isfinite() & loss.isfinite() & (loss <= self.inputs.loss_limit)
        factor = grad_scale * (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip > 0 else grad_scale
        now = Update(self.inputs.number, self.inputs.lr, factor, taken)
        for name, rule in self.rules.items():
            rule.update(self._of(name, reduced), now)
        self.overlap.publish()
        return StepResult(norm, taken)

    def end_step(self, taken: bool) -> None:
        """Take note of whether a step was taken."""
        self.updates += taken

    def _of(self, rule: str, values: list[T]) -> list[T]:
        """Pick, from one value a bucket, those of the buckets that a rule updates."""
        return [value for bucket, value in zip(self.buckets, values) if bucket.key.rule == rule]

    def _global_norm(self, reduced: list[Tensor]) -> Tensor:
        """Return the norm, a float64 scalar, over every logical parameter once, whatever the layout replicates.

        Each parameter's square is summed by itself, and those exactly: neither what shares a bucket nor which rank
        has what changes a bit.
        """
        squares = [
            ops.squared_norm(grad[max(span.start - bucket.start, 0) : span.stop - bucket.start])
            for bucket, grad in zip(self.buckets, reduced)
            if bucket.counts
            for span in bucket.spans
            if span.start < bucket.stop and span.stop > bucket.start
        ]
        own = torch.stack(squares) if squares else torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        return exact_sum(own, self.mesh.world).sqrt()

    def state_parts(self) -> Iterator[StatePart]:
        """Yield this rank's part of the optimizer state of every parameter that it updates."""
        for owned in self.runs:
            tensors = dict(owned.state)
            if owned.has_master:
                tensors["master"] = owned.master
            for kind, tensor in tensors.items():
                yield from self._parts(kind, owned.bucket, tensor)

    def divides(self, param: nn.Parameter) -> bool:
        """Return whether the values of a parameter are divided: then only runs of them are here all the time."""
        return any(span.param is param for bucket in self.buckets if bucket.divides_values for span in bucket.spans)

    def weight_parts(self) -> Iterator[StatePart]:
        """Yield this rank's part of the weights whose values are divided."""
        for bucket in self.buckets:
            if bucket.divides_values:
                yield from self._parts("weight", bucket, bucket.run)

    def _parts(self, kind: str, bucket: Bucket, tensor: Tensor) -> Iterator[StatePart]:
        """Cut a tensor that lies as a bucket's run into the parts of its parameters."""
        sizes, coords = self.mesh.spec.sizes, self.mesh.coords
        for span in bucket.spans:
            first, last = max(span.start, bucket.start), min(span.stop, bucket.stop)
            if first < last:
                place = run_extents(span.spec, sizes, coords, first - span.start, last - span.start)
                run = tensor[first - bucket.start : last - bucket.start]
                yield StatePart(kind, span.spec, run, place, span.spec.is_owner(self.mesh), bucket.replicas)

    def refresh_masters(self) -> None:
        """Take the master values from the model's, after weights were loaded without optimizer state."""
        for owned in self.runs:
            owned.refresh()
        self.overlap.publish_codes()

    def publish_masters(self) -> None:
        """Have masters and model agree, after both were loaded: masters that say more, or else the model's values."""
        for owned in self.runs:
            if owned.has_master:
                owned.publish()
            else:
                owned.refresh()
        self.overlap.publish()
