"""`Staging`: host memory that holds a copy of what a rank saves, while the originals go on changing.

    train ─ step n ─┬ copy ┬─ step n + 1 ─────── step n + 2 ─ …
                    └──────┴─ hash and write ─┐
                                              └ the next step publishes

The memory is taken at the first save and kept: its pages are there from then on, and copying is as fast as
memory. On a GPU it is pinned, and the copies are queued behind the step's own work.
"""

import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGN_BYTES = 64
Part = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]  # of one tensor: dtype, shape, and what gives it


class Staging:
    """Memory for one copy; a new copy overwrites the last one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return len(self._memory)

    def copy(self, parts: Sequence[Part]) -> list[Callable[[], Tensor]]:
        """Copy tensors, all of which are on one device.

        Returns: for each a function that returns its copy, on the CPU, and waits until it is there.
        """
        starts, end = [], 0
        for dtype, shape, _ in parts:
            starts.append(end)
            end += torch.Size(shape).numel() * dtype.itemsize
            end += -end % _ALIGN_BYTES
        sources = [value() for _, _, value in parts]
        cuda = any(source.is_cuda for source in sources)
        if end > len(self._memory):
            self._memory = _memory(end, pinned=cuda)
        copies = []
        for start, source in zip(starts, sources):
            room = self._memory[start : start + source.numel() * source.itemsize]
            copies.append(room.view(source.dtype).view(source.shape))
            copies[-1].copy_(source, non_blocking=True)
        arrived = None
        if cuda:
            arrived = torch.cuda.Event()
            arrived.record()

        def copied(copy: Tensor) -> Callable[[], Tensor]:
            def value() -> Tensor:
                if arrived is not None:
                    arrived.synchronize()
                return copy

            return value

        return [copied(copy) for copy in copies]


def _memory(n_bytes: int, pinned: bool) -> Tensor:
    """Return memory in huge pages, or pinned: [n_bytes] uint8."""
    if pinned:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, n_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
