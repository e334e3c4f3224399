"""Parameters and gradients in contiguous buckets: what is synchronised, clipped and updated alike lies together.

    params   p0 p1 p2 …           each a view of
    values   [numel]              one tensor in the model's dtype, and its gradient a view of
    grads    [numel]              one tensor in float32 (float64 for float64 models), summed over micro-batches

A bucket holds parameters with the same update rule, decay, grad_axes and owners, so every rule about gradients is one
operation on a whole bucket. Under ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1) data-parallel rank r
owns elements r · numel/dp … (r + 1) · numel/dp of it: gradients are reduce-scattered, the owner updates its run, and
the values are all-gathered. `numel` is padded so that it divides.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec, spec_of
from megascratch.dist.mesh import Mesh


@dataclass(frozen=True)
class BucketKey:
    """What the parameters of one bucket have in common."""

    rule: str  # name of the update rule
    decay: bool
    grad_axes: tuple[str, ...]
    tied: bool  # a second copy: where it is one depends on the pipeline rank alone, so tp ranks have equal buckets
    data_axis: str  # replicas that see different tokens: the gradient is summed over them
    owned: bool  # whether this rank's copy counts, apart from replicas along dp and cp


@dataclass(frozen=True)
class Span:
    """Where a parameter lies in its bucket: elements start ≤ i < stop."""

    spec: ParamSpec
    param: nn.Parameter
    start: int
    stop: int


class Bucket:
    """Parameters with a common key, contiguous, with their gradients.

    Args:
        key: what they have in common.
        params: whose data become views of `values`.
        mesh: this rank's place.
        zero: ZeRO stage, 0 or 1.
    """

    def __init__(self, key: BucketKey, params: list[nn.Parameter], mesh: Mesh, zero: int) -> None:
        self.key, self.mesh = key, mesh
        self.axis = mesh.axis(key.data_axis)
        self.sharded = zero > 0 and self.axis.size > 1
        numel = sum(p.numel() for p in params)
        numel += -numel % (self.axis.size if self.sharded else 1)
        first = params[0]
        self.values = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(numel, dtype=ops.acc_dtype(first), device=first.device)
        self.spans: list[Span] = []
        start = 0
        for param in params:
            stop = start + param.numel()
            view = self.values[start:stop].view(param.shape)
            view.copy_(param.detach())
            param.data = view
            self.spans.append(Span(spec_of(param), param, start, stop))
            self._accumulate_into(param, self.grads[start:stop].view(param.shape))
            start = stop
        part = numel // self.axis.size if self.sharded else numel
        self.start = self.axis.rank * part if self.sharded else 0
        self.stop = self.start + part

    def _accumulate_into(self, param: nn.Parameter, main_grad: Tensor) -> None:
        param.main_grad = main_grad  # type: ignore[attr-defined]  # layers may add to it themselves

        def add(p: Tensor) -> None:
            if p.grad is None:  # the hook runs also where a layer added to the main gradient, or put this one off
                return
            main_grad.add_(p.grad)
            p.grad = None

        param.register_post_accumulate_grad_hook(add)

    @property
    def run(self) -> Tensor:
        """The values that this rank updates: its run under ZeRO-1, else all of them."""
        return self.values[self.start : self.stop]

    @property
    def counts(self) -> bool:
        """Whether the run enters global sums and checkpoints from this rank: exactly one replica does."""
        return self.key.owned and (self.sharded or self.axis.rank == 0)

    def reduced_grads(self) -> Tensor:
        """Sum the gradients over all ranks that hold a part of them; return those of `run`, [stop − start]."""
        for name in self.key.grad_axes:
            comm.reduce_buffer(self.grads, self.mesh.axis(name))
        if self.sharded:
            return comm.reduce_scatter_buffer(self.grads, self.axis)
        comm.reduce_buffer(self.grads, self.axis)
        return self.grads

    def publish(self) -> None:
        """Give every data-parallel rank the values that the others updated."""
        if self.sharded:
            comm.all_gather_buffer(self.values, self.run.clone(), self.axis)


def make_buckets(
    params: Iterable[nn.Parameter], mesh: Mesh, zero: int, max_numel: int, rule_of: Callable[[ParamSpec], str]
) -> list[Bucket]:
    """Sort parameters into buckets.

    Args:
        params: of all stages on this rank, each with its `ParamSpec`.
        mesh: this rank's place.
        zero: ZeRO stage, 0 or 1.
        max_numel: a bucket is closed once it holds this many elements.
        rule_of: names a parameter's update rule.

    Returns: buckets in an order that depends on the specs alone, so ranks with equal specs issue equal collectives.
    """
    groups: dict[BucketKey, list[list[nn.Parameter]]] = {}
    for param in params:
        spec = spec_of(param)
        if not param.requires_grad:  # frozen, or set outside the gradient
            continue
        owned = spec.is_owner(mesh)
        key = BucketKey(rule_of(spec), spec.decay, spec.grad_axes, spec.tied, spec.data_axis, owned)
        runs = groups.setdefault(key, [[]])
        if runs[-1] and sum(p.numel() for p in runs[-1]) + param.numel() > max_numel:
            runs.append([])
        runs[-1].append(param)
    return [Bucket(key, run, mesh, zero) for key, runs in groups.items() for run in runs]
