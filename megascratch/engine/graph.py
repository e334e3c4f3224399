"""A whole training step as one CUDA graph: recorded once, then replayed without Python.

    steps 1, 2   run as usual, on a side stream: libraries allocate their workspaces, ranks connect
    step 3       the same calls are recorded, reading micro-batches from buffers that stay
    from then    copy the micro-batches into the buffers, replay, read what the step found where the recording left it

A step of many small kernels is bound by the processor that launches them; a graph launches them all at once: zeroing of
gradients, forward, backward, the sums over ranks, norm and clipping, the update and what gives its values to other
ranks. Three rules make that possible, for all steps whether recorded or not:

- a number that changes from step to step is read from the device (`optim.inputs`), never computed with by Python;
- whether the step is taken is decided on the device: one with an infinite gradient runs to its end and changes nothing;
- what a step leaves in Python's own state (whether a bucket is reduced, what travels) is the same after every step.

What cannot keep them is refused (`config.check_graphs`). Other threads of the process go on while a step is recorded:
NCCL's watchdog asks for events, autograd runs backward.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megascratch.data.microbatch import Microbatch
from megascratch.errors import ConfigError, Problem

_WARM_UP_STEPS = 2

T = TypeVar("T")


class Recorder(Protocol):
    """How a device records: for a GPU `_CudaRecorder`, for a test whatever keeps to the same rules."""

    def warm_up(self, step: Callable[[], T]) -> T:
        """Run one of the steps before the recording."""
        ...

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record what a step would do, without doing it: return where its results will lie, and what does it."""
        ...


class StepGraph(Generic[T]):
    """Runs steps; from the third time on by replaying a recording.

    Args:
        recorder: of the device.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._steps = 0
        self._static: list[Microbatch] = []
        self._recorded: tuple[T, Callable[[], None]] | None = None

    def __call__(self, step: Callable[[Sequence[Microbatch]], T], microbatches: Sequence[Microbatch]) -> T:
        """Run a step on micro-batches, or its recording. What it returns holds until the next call.

        Args:
            step: the same computation at every call.
            microbatches: as many as before, of the shapes and on the device of before.
        """
        self._steps += 1
        if self._steps <= _WARM_UP_STEPS:
            return self._recorder.warm_up(lambda: step(microbatches))
        if self._recorded is None:
            self._static = [microbatch.apply(Tensor.clone) for microbatch in microbatches]
            self._recorded = self._recorder.record(lambda: step(self._static))
        for static, microbatch in zip(self._static, microbatches, strict=True):
            for own, given in zip(static.tensors(), microbatch.tensors(), strict=True):
                own.copy_(given)
        results, replay = self._recorded
        replay()
        return results


class _CudaRecorder:
    """Records on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], T]) -> T:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            results = step()
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return results

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
        return results, graph.replay


def cuda_step_graph(device: torch.device) -> StepGraph[T]:
    """Return a graph that records on a GPU.

    Raises: ConfigError: on any other device.
    """
    if device.type != "cuda":
        problem = Problem("train.cuda_graph = true", f"needs a GPU; this run is on the {device.type}", "leave it out")
        raise ConfigError(problem)
    return StepGraph(_CudaRecorder(device))
