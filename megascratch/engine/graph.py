"""Forward and backward of a whole global batch as one CUDA graph: recorded once, then replayed without Python.

    steps 1, 2   run as usual, on a side stream: libraries allocate their workspaces
    step 3       the same calls are recorded, reading microbatches from buffers that stay
    from then    copy the microbatches into the buffers, replay, read the sums from where the recording left them

A step of many small kernels is bound by the processor that launches them; a graph launches them all at once. The
optimizer stays outside: it needs numbers that change with each step, and is a handful of launches. So do the reductions
over data-parallel ranks, which begin during backward: those layouts are refused (`config.check`).

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megascratch.data.microbatch import Microbatch
from megascratch.errors import ConfigError, Problem

_WARM_UP_STEPS = 2

Sums = dict[str, Tensor]
Drive = Callable[[Sequence[Microbatch]], Sums]
"""Forward and backward of microbatches: gradients are added to their buffers, and the loss's sums are returned."""
Record = Callable[[Callable[[], Sums]], tuple[Sums, Callable[[], None]]]
"""Records what a function would do, without doing it: returns where its results will lie, and what does it."""


class StepGraph:
    """Runs a step's forward and backward; from the third time on by replaying a recording.

    Args:
        warm_up: runs the first steps, given a function without arguments.
        record: see `Record`.
    """

    def __init__(self, warm_up: Callable[[Callable[[], Sums]], Sums], record: Record) -> None:
        self._warm_up, self._record = warm_up, record
        self._steps = 0
        self._static: list[Microbatch] = []
        self._sums: Sums = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, drive: Drive, microbatches: Sequence[Microbatch]) -> Sums:
        """Run `drive` on the microbatches, or its recording. What it returns holds until the next call.

        Args:
            drive: the same computation at every call.
            microbatches: as many as before, of the shapes and on the device of before.
        """
        self._steps += 1
        if self._steps <= _WARM_UP_STEPS:
            return self._warm_up(lambda: drive(microbatches))
        if self._replay is None:
            self._static = [microbatch.apply(Tensor.clone) for microbatch in microbatches]
            self._sums, self._replay = self._record(lambda: drive(self._static))
        for static, microbatch in zip(self._static, microbatches, strict=True):
            for own, given in zip(static.tensors(), microbatch.tensors(), strict=True):
                own.copy_(given)
        self._replay()
        return self._sums


def cuda_step_graph(device: torch.device) -> StepGraph:
    """Return a graph that records on a GPU.

    Raises: ConfigError: on any other device.
    """
    if device.type != "cuda":
        problem = Problem("train.cuda_graph = true", f"needs a GPU; this run is on the {device.type}", "leave it out")
        raise ConfigError(problem)
    side = torch.cuda.Stream(device)

    def warm_up(drive: Callable[[], Sums]) -> Sums:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            sums = drive()
        torch.cuda.current_stream(device).wait_stream(side)
        return sums

    def record(drive: Callable[[], Sums]) -> tuple[Sums, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = drive()
        return sums, graph.replay

    return StepGraph(warm_up, record)
