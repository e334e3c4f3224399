"""Parameters and gradients in contiguous buckets: what is synchronised, clipped and updated alike lies together.

    params   p0 p1 p2 …           each a view of
    values   [numel]              one tensor in the model's dtype, and its gradient a view of
    grads    [numel]              one tensor in the dtype that `precision.py` says, summed over micro-batches

A bucket holds parameters of one stage with the same update rule, pace, grad_axes and owners, so every rule about
gradients is one operation on a whole bucket; what makes a bucket is the same on all ranks that hold the stage. ZeRO
(Rajbhandari et al. 2020, arXiv:1910.02054, section 5) divides a bucket over the `shard` axis, whose rank r owns its
*run*, elements r · numel/n … (r + 1) · numel/n; `numel` is padded so that it divides:

    stage   whole on every rank          divided                       when it travels
    0       values, gradients            –                             gradients: all-reduce, once a step
    1       values, gradients            optimizer state               gradients: reduce-scatter, once a step; values:
                                                                       all-gather after the update
    2       values                       gradients, optimizer state    gradients: reduce-scatter after every backward
    3       vectors (norms, biases)      values too                    values: all-gather before every use

A bucket of linear weights may send codes in fp8 for its values (`codes.py`); those are divided at every stage then.
Where the shard axis is shorter than the data-parallel one (HSDP), the run's gradient is summed over its replicas too.
What starts a transfer, and when, is `overlap.py`'s business: here every one is started and finished apart.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megascratch.config import ParallelConfig
from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec, spec_of
from megascratch.dist.mesh import Axis, Mesh
from megascratch.dist.sums import tree_reduce_buffer
from megascratch.optim.codes import Codes
from megascratch.optim.divided import Divided
from megascratch.optim.groups import Pace
from megascratch.optim.precision import Precision
from megascratch.optim.tree import TreeSum


@dataclass(frozen=True)
class BucketKey:
    """What the parameters of one bucket have in common."""

    rule: str  # name of the update rule
    pace: Pace
    grad_axes: tuple[str, ...]
    tied: bool  # a second copy: where it is one depends on the pipeline rank alone, so tp ranks have equal buckets
    data_axis: str  # replicas that see different tokens: the gradient is summed over them
    replicated: bool  # over tp, where one copy counts
    divided: bool  # whether ZeRO-3 divides the values too
    in_codes: bool  # whether fp8 codes travel in place of the values


@dataclass(frozen=True)
class Span:
    """Where a parameter lies in its bucket: elements start ≤ i < stop."""

    spec: ParamSpec
    param: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that are used together.

    Attributes:
        stages: numbers of the stages that use them.
        params: each with its `ParamSpec`.
        module: whose forward uses them; None where they are used at any time while a stage runs.
        linear: those of linear layers, which may multiply in fp8.
    """

    stages: frozenset[int]
    params: tuple[nn.Parameter, ...]
    module: nn.Module | None = None
    linear: frozenset[Tensor] = frozenset()

    @classmethod
    def one(cls, params: Iterable[nn.Parameter]) -> "Unit":
        """Take all parameters of a model of one stage as one unit."""
        return cls(frozenset({0}), tuple(params))


def host_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in host memory, from which a GPU reads without the processor."""
    return torch.empty(x.shape, dtype=dtype, device="cpu", pin_memory=x.is_cuda).copy_(x)


class Bucket:
    """Parameters with a common key, contiguous, with their gradients.

    Args:
        key: what they have in common.
        params: whose data become views of `values`.
        mesh: this rank's place.
        parallel: ZeRO stage, order of sums, and what is kept in host memory.
        stages: numbers of the stages that use them.
        grad_dtype: in which gradients are summed.
    """

    def __init__(
        self,
        key: BucketKey,
        params: list[nn.Parameter],
        mesh: Mesh,
        parallel: ParallelConfig,
        stages: frozenset[int],
        grad_dtype: torch.dtype,
    ) -> None:
        self.key, self.mesh, self.stages, zero = key, mesh, stages, parallel.zero
        assert not parallel.deterministic_dp or (zero == 0 and len(stages) == 1)
        self.tree = TreeSum() if parallel.deterministic_dp else None
        everyone = mesh.axis(key.data_axis)
        # Experts' own replicas are not taken apart: `zero_ranks` does not go with ep.
        shard, replicas = (mesh.shard, mesh.replicas) if key.data_axis == "data" else (everyone, Axis("replicas"))
        self.sharded = zero > 0 and shard.size > 1
        self.axis = shard if self.sharded else Axis("shard")
        self.replicas = replicas if self.sharded else everyone
        self.divides_grads = zero >= 2 and self.sharded
        self.divides_values = (key.divided or key.in_codes) and self.sharded
        self.is_on_host = self.divides_values and parallel.offload_parameters  # the run, not the whole values
        numel = sum(p.numel() for p in params)
        numel += -numel % self.axis.size
        part = numel // self.axis.size
        self.start, self.stop = self.axis.rank * part, (self.axis.rank + 1) * part
        first = params[0]
        self.values = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self._grads = torch.empty(part if self.divides_grads else numel, dtype=grad_dtype, device=first.device)
        self._has_grads = False
        # In a fixed tree they change places with others, and a GPU's allocator would cut so large a piece up.
        self._frees_grads = self.tree is None and first.device.type == "cpu"
        self.zero_grads()
        self.on_gradient: Callable[[Bucket, Tensor], None] = lambda bucket, param: None
        self.on_release: Callable[[Iterable[Tensor]], None] = lambda params: None
        self.spans: list[Span] = []
        start = 0
        for param in params:
            stop = start + param.numel()
            view = self.values[start:stop].view(param.shape)
            view.copy_(param.detach())
            param.data = view
            self.spans.append(Span(spec_of(param), param, start, stop))
            self._accumulate(self.spans[-1])
            start = stop
        self._arrived: Tensor | None = None  # sums of gradients [numel] that ZeRO-2 has not divided yet
        self._reducing: tuple[comm.Work | None, Tensor, Tensor] | None = None  # with what is summed, and the sum
        run = self.values[self.start : self.stop]
        if self.divides_values:
            run = host_copy(run, run.dtype) if self.is_on_host else run.clone()
        self._values = Divided(self.values, run, self.axis, mesh.data, lasts=not self.divides_values)
        self.codes: Codes | None = None
        if key.in_codes and self.sharded:
            self.codes = self._make_codes(lasts=not key.divided)
        self._used = self._values if self.codes is None else self.codes.divided  # in forwards and backwards

    def _accumulate(self, span: Span) -> None:
        def main_grad() -> Tensor:
            return self._sums[span.start : span.stop].view(span.param.shape)

        # Python's collector does not see through hooks: one that held the bucket would keep it for ever.
        found = weakref.ref(self)

        def add(p: Tensor) -> None:
            if p.grad is not None:  # the hook runs also where a layer added to the main gradient, or put this one off
                p.main_grad().add_(p.grad)  # type: ignore[attr-defined]
                p.grad = None
            if (bucket := found()) is not None:
                bucket.on_gradient(bucket, p)

        span.param.main_grad = main_grad  # type: ignore[attr-defined]  # layers may add to it themselves
        span.param.register_post_accumulate_grad_hook(add)

    def _make_codes(self, lasts: bool) -> Codes:
        bounds, data = [(span.start, span.stop) for span in self.spans], self.mesh.data
        codes = Codes(bounds, self.values, self.run, self.start, self.axis, data, lasts)
        for i, span in enumerate(self.spans):
            span.param.codes = partial(codes.of, i, span.param.shape)  # type: ignore[attr-defined]
        return codes

    @property
    def grads(self) -> Tensor:
        """Sums of gradients, [stop − start] where ZeRO divides them, else [numel]; zeros until a step has some."""
        if not self._has_grads:
            self._grads.untyped_storage().resize_(self._grads.nbytes)
            self._grads.zero_()
            self._has_grads = True
        return self._grads

    @property
    def _sums(self) -> Tensor:
        """Where gradients are added up, [numel]."""
        if not self.divides_grads:
            return self.grads
        if self._arrived is None:
            self._arrived = torch.zeros(self.values.numel(), dtype=self._grads.dtype, device=self._grads.device)
        return self._arrived

    @property
    def run(self) -> Tensor:
        """The values that this rank updates, [stop − start]: its run under ZeRO, else all of them."""
        return self._values.run

    @property
    def counts(self) -> bool:
        """Whether the run enters global sums and checkpoints from this rank: exactly one replica does."""
        return self.spans[0].spec.is_owner(self.mesh) and self.replicas.rank == 0

    def zero_grads(self) -> None:
        """Forget the gradients of the last step. On a CPU activations may have their memory, until the first one comes:
        that is when a layer's activations are done with, so that with one micro-batch a step only the larger of the two
        has to fit."""
        self._is_reduced = False  # whether a reduction has started since
        if self._frees_grads:
            self._grads.untyped_storage().resize_(0)
            self._has_grads = False
        else:
            self.grads.zero_()

    def keep_grads(self) -> None:
        """Have memory for gradients all the time: what compiled code adds to must not come and go."""
        self._frees_grads = False
        self.zero_grads()

    def end_leaf(self) -> None:
        """What has been added up is one leaf of the tree."""
        if self.tree is not None:
            self._grads = self.tree.add(self.grads)

    def start_reduction(self) -> None:
        """Start to sum over the shard axis what has been added up. ZeRO-2 may do so many times a step, others once."""
        self.finish_reduction()
        if self.tree is not None:
            self._grads = self.tree.total(unused=self.grads)
            tree_reduce_buffer(self.grads, self.mesh.dp)
            comm.reduce_buffer(self.grads, self.mesh.cp)
            self._is_reduced = True
            return
        sums = self._sums
        if self.sharded:
            result = sums.new_empty(self.stop - self.start)
            self._reducing = comm.start_reduce_scatter(sums, result, self.axis), sums, result
        else:
            self._reducing = comm.start_all_reduce(sums, self.replicas), sums, sums
        self._arrived, self._is_reduced = None, True

    def finish_reduction(self) -> None:
        """Wait for the sum."""
        if self._reducing is None:
            return
        work, _, result = self._reducing
        self._reducing = None
        if work is not None:
            with self.mesh.data.waiting("reduce"):
                work.wait()
        if self.divides_grads:
            self.grads.add_(result)
        elif self.sharded:
            self.grads[self.start : self.stop] = result

    def reduced_grads(self) -> Tensor:
        """Return the gradients of `run`, [stop − start], summed over all ranks that hold a part of them."""
        if not self._is_reduced or self._arrived is not None:
            self.start_reduction()
        self.finish_reduction()
        grads = self.grads if self.divides_grads else self.grads[self.start : self.stop]
        if self.sharded:
            comm.reduce_buffer(grads, self.replicas)
        for name in self.key.grad_axes:
            comm.reduce_buffer(grads, self.mesh.axis(name))
        return grads

    @property
    def lasts(self) -> bool:
        """Whether what forwards and backwards use stays between them; ZeRO-3 gives it back."""
        return self._used.lasts

    def publish(self) -> None:
        """Start to give every rank of the shard axis what the others updated; ZeRO-3 waits until `fetch`."""
        self._used.publish()

    def fetch(self) -> None:
        """Start to bring here what ZeRO-3 divides."""
        self._used.fetch()

    def need(self) -> None:
        """Have here what forwards and backwards use."""
        self._used.need()

    def release(self) -> None:
        """Give back the memory of what ZeRO-3 divides; `run` stays."""
        if not self.lasts:
            self._used.release()
            self.on_release(span.param for span in self.spans)

    def start_gather(self) -> None:
        """Start to bring all values here, for what reads them outside of a step."""
        self._values.fetch()

    def gather(self) -> None:
        """Have all values here."""
        self._values.need()

    def give_back(self) -> None:
        """Give back the memory of values that are divided."""
        self._values.release()


def make_buckets(
    units: Iterable[Unit],
    mesh: Mesh,
    parallel: ParallelConfig,
    max_numel: int,
    rule_of: Callable[[ParamSpec], str],
    pace_of: Callable[[ParamSpec], Pace],
    precision_of: Callable[[torch.dtype], Precision],
) -> list[Bucket]:
    """Sort parameters into buckets, those that learn.

    Args:
        units: of all stages on this rank.
        mesh: this rank's place.
        parallel: see `Bucket`.
        max_numel: a bucket is closed once it holds this many elements, and in front of a unit that does not fit in.
        rule_of: names a parameter's update rule.
        pace_of: its learning rate's factor and its weight decay.
        precision_of: what is kept beside a value of the model's dtype.

    Returns: buckets in an order that depends on the specs alone, so ranks with equal specs issue equal collectives.
    """
    groups: dict[tuple[int | frozenset[int], BucketKey], list[list[nn.Parameter]]] = {}
    for index, unit in enumerate(units):
        for param in unit.params:
            if not param.requires_grad:  # frozen, or set outside the gradient
                continue
            spec = spec_of(param)
            # A collective for each norm would cost more than the thousandth of the memory that it saves.
            divided = parallel.zero == 3 and len(spec.shape) > 1
            in_codes = parallel.fp8_param_gather and param in unit.linear
            key = BucketKey(
                rule_of(spec),
                pace_of(spec),
                spec.grad_axes,
                spec.tied,
                spec.data_axis,
                not spec.is_split_over("tp"),
                divided,
                in_codes,
            )
            runs = groups.setdefault((index if divided else unit.stages, key), [[]])
            if runs[-1] and sum(p.numel() for p in runs[-1]) + param.numel() > max_numel:
                runs.append([])
            runs[-1].append(param)
    stages = [unit.stages for unit in units]
    return [
        Bucket(
            key,
            run,
            mesh,
            parallel,
            stages[scope] if isinstance(scope, int) else scope,
            precision_of(run[0].dtype).grads,
        )
        for (scope, key), runs in groups.items()
        for run in runs
    ]
