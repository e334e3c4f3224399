"""When buckets travel: gradients while the backward still runs, values while the forward already does.

The pipeline tells of every action before and after it (`on_action`), parameters tell of their gradients, and layers of
their forward. By hand, ZeRO-1, one stage of two layers, buckets 0 (first layer) and 1 (second), two micro-batches:

    F0 B0 F1 B1 ─ second layer's gradients here: start to reduce bucket 1 ─ first layer's: bucket 0 ─┐
    update ◄── wait for both ────────────────────────────────────────────────────────────────────────┘
       └─ start to gather 0 and 1 ─ F0: wait for 0, first layer, wait for 1, second layer …

ZeRO-2 reduces after every backward. ZeRO-3 gathers a layer while the one before it runs, in the backward the other way,
and releases it after. Collectives start in one fixed order on all ranks of an axis, whatever order gradients come in:
a bucket that is ready waits for those before it, and those that never get ready go at the end of the action.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from megascratch.optim.buckets import Bucket, Unit
from megascratch.optim.codes import quantize_all
from megascratch.optim.tree import leaf_length

# ZeRO-2 keeps the whole gradients of a bucket until they are reduced: so many reductions may be under way.
BUCKETS_UNDER_WAY = 2


class Overlap:
    """Moves the buckets of one rank.

    Args:
        buckets: in an order that ranks with equal specs share.
        units: whose parameters they hold, in the order of the forward.
    """

    def __init__(self, buckets: Sequence[Bucket], units: Sequence[Unit]) -> None:
        self.buckets = buckets
        bucket_of = {span.param: bucket for bucket in buckets for span in bucket.spans}

        def buckets_of(units: Iterable[Unit]) -> list[Bucket]:
            return list(dict.fromkeys(bucket_of[p] for unit in units for p in unit.params if p in bucket_of))

        stages = {stage for unit in units for stage in unit.stages}
        own = {stage: [unit for unit in units if stage in unit.stages] for stage in stages}
        self._of_stage = {stage: buckets_of(own[stage]) for stage in stages}
        self._rest = {stage: buckets_of(unit for unit in own[stage] if unit.module is None) for stage in stages}
        self._layers: dict[int, list[list[Bucket]]] = {}  # of a stage, of its layers in order
        self._backwards_left: dict[int, int] = {}  # of each stage, in this step
        self._leaf_lengths: dict[int, int] = {}  # backwards of a stage that make one leaf of a fixed tree
        self._queue: deque[Bucket] = deque()  # to be reduced in this action, in order
        self._under_way: deque[Bucket] = deque()  # reductions of ZeRO-2, oldest first
        self._missing: dict[Bucket, set[Tensor]] = {}  # of the queue, if gradients tell when a bucket is ready
        self._is_backward = False
        for bucket in buckets:
            bucket.on_gradient = self._on_gradient
        for stage in stages:
            layers = [(unit, unit.module) for unit in own[stage] if unit.module is not None]
            self._layers[stage] = [buckets_of([unit]) for unit, _ in layers]
            for index, (_, module) in enumerate(layers):
                module.register_forward_pre_hook(self._before_forward(stage, index))
                module.register_forward_hook(self._after_forward(stage, index))

    def begin_step(self, backwards: Mapping[int, int]) -> None:
        """Be ready for a step.

        Args:
            backwards: how many backwards each stage will have; of split ones, the weights' halves count.
        """
        self._backwards_left = dict(backwards)
        self._leaf_lengths = {stage: leaf_length(n) for stage, n in backwards.items()}

    def start_forward(self, stage: int) -> None:
        """A stage is about to run forwards."""
        self._start(stage, first_layer=0)

    def end_forward(self, stage: int) -> None:
        """It has run."""
        for bucket in self._of_stage[stage]:
            bucket.release()

    def start_backward(self, stage: int) -> None:
        """A stage is about to run backwards, and gives all its gradients."""
        self._plan_reductions(stage)
        self._missing = {bucket: {span.param for span in bucket.spans} for bucket in self._queue}
        self.start_input_backward(stage)

    def end_backward(self, stage: int) -> None:
        """It has run."""
        self._missing.clear()
        self.end_input_backward(stage)
        self.end_weight_backward(stage)

    def start_input_backward(self, stage: int) -> None:
        """A stage is about to run backwards, and puts the gradients of its weights off."""
        self._is_backward = True
        self._start(stage, first_layer=-1)

    def end_input_backward(self, stage: int) -> None:
        """It has run."""
        self._is_backward = False
        self.end_forward(stage)

    def start_weight_backward(self, stage: int) -> None:
        """A stage is about to compute gradients that it put off."""
        self._plan_reductions(stage)

    def end_weight_backward(self, stage: int) -> None:
        """It has computed them."""
        while self._queue:
            self._reduce_next()
        self._backwards_left[stage] -= 1
        if self._backwards_left[stage] % self._leaf_lengths[stage] == 0:
            for bucket in self._of_stage[stage]:
                bucket.end_leaf()

    def _start(self, stage: int, first_layer: int) -> None:
        """Have what a stage needs all the time, and start to fetch the layer that it begins with."""
        layers, rest = self._layers[stage], self._rest[stage]
        for bucket in [*rest, *(layers[first_layer] if layers else ())]:
            bucket.fetch()
        for bucket in rest:
            bucket.need()

    def _plan_reductions(self, stage: int) -> None:
        """Line up the buckets that travel in this backward: those of ZeRO-2 always, others in the last one of a step.

        The gradients of the last layers come first, and in most models their buckets are the last.
        """
        self._queue = deque(
            bucket
            for bucket in reversed(self._of_stage[stage])
            if bucket.tree is None  # which is whole after the last backward alone
            if bucket.divides_grads or sum(self._backwards_left.get(s, 0) for s in bucket.stages) == 1
        )

    def _on_gradient(self, bucket: Bucket, param: Tensor) -> None:
        """Start the reductions that are ready. In a backward that gives all gradients, each parameter has one."""
        if bucket in self._missing:
            self._missing[bucket].discard(param)
            while self._queue and not self._missing[self._queue[0]]:
                self._reduce_next()

    def _reduce_next(self) -> None:
        bucket = self._queue.popleft()
        bucket.start_reduction()
        if bucket.divides_grads:
            self._under_way.append(bucket)
            if len(self._under_way) > BUCKETS_UNDER_WAY:
                self._under_way.popleft().finish_reduction()

    def _before_forward(self, stage: int, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            layers = self._layers[stage]
            for bucket in layers[index]:
                bucket.need()
            if not self._is_backward and index + 1 < len(
                layers
            ):  # in a backward, a layer is run again for its own sake
                for bucket in layers[index + 1]:
                    bucket.fetch()

        return hook

    def _after_forward(self, stage: int, index: int) -> Callable[..., None]:
        divides = not all(bucket.lasts for layer in self._layers[stage] for bucket in layer)
        found = weakref.ref(self)  # see `Bucket._accumulate`

        def before_backward(_: Tensor) -> None:
            if (overlap := found()) is not None:
                overlap._before_backward(stage, index)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._is_backward:
                return
            for bucket in self._layers[stage][index]:
                bucket.release()
            if output.requires_grad and divides:
                output.register_hook(before_backward)

        return hook

    def _before_backward(self, stage: int, index: int) -> None:
        layers = self._layers[stage]
        for bucket in layers[index]:
            bucket.need()
        # The gradient of this layer's output is there, so the layer behind it needs its weights no more.
        for bucket in layers[index + 1] if index + 1 < len(layers) else ():
            bucket.release()
        for bucket in layers[index - 1] if index > 0 else ():
            bucket.fetch()

    def publish(self) -> None:
        """Start to give every rank what the others updated. What a stage needs all the time is here at the end."""
        self._quantize()
        for bucket in self.buckets:
            bucket.publish()
        for bucket in [bucket for rest in self._rest.values() for bucket in rest if bucket.lasts]:
            bucket.need()

    def publish_codes(self) -> None:
        """Do so where codes travel, after values were made or loaded."""
        self._quantize()
        for bucket in self.buckets:
            if bucket.codes is not None:
                bucket.publish()

    def _quantize(self) -> None:
        quantize_all([bucket.codes for bucket in self.buckets if bucket.codes is not None])

    def settle(self) -> None:
        """Wait for what is under way."""
        for bucket in self.buckets:
            if bucket.lasts:
                bucket.need()

    def gather(self) -> None:
        """Have all values here, for what reads them outside of a step."""
        for bucket in self.buckets:
            bucket.start_gather()
        for bucket in self.buckets:
            bucket.gather()

    def give_back(self) -> None:
        """Give back the memory of all values that are divided."""
        for bucket in self.buckets:
            bucket.give_back()
