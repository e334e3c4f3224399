"""`Staging`: host memory that holds a copy of what a rank saves, while the originals go on changing.

    train ─ step n ─┬ copy ┬─ step n + 1 ─────── step n + 2 ─ …
                    └──────┴─ hash and write ─┐
                                              └ the next step publishes

The memory is kept: its pages are there from then on, and copying is as fast as memory. On a GPU it is pinned, and the
copies are queued behind the step's own work.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGN_BYTES = 64
Part = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]  # of one tensor: dtype, shape, and what gives it


class Staging:
    """Memory for one copy; a new copy overwrites the last one.

    Args:
        n_bytes: to take at once, in the background: a fresh page costs several times as much as a copy into it.
        pinned: whether a GPU is to copy into it.
    """

    def __init__(self, n_bytes: int = 0, *, pinned: bool = False) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._taker = threading.Thread(target=self._take, args=(n_bytes, pinned), daemon=True)
        self._taker.start()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return len(self._memory)

    def _take(self, n_bytes: int, pinned: bool) -> None:
        self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._memory.zero_()

    def copy(self, parts: Sequence[Part]) -> list[Callable[[], Tensor]]:
        """Copy tensors, all of which are on one device.

        Returns: for each a function that returns its copy, on the CPU, and waits until it is there.
        """
        self._taker.join()
        starts, end = [], 0
        for dtype, shape, _ in parts:
            starts.append(end)
            end += aligned(torch.Size(shape).numel() * dtype.itemsize)
        sources = [value() for _, _, value in parts]
        cuda = any(source.is_cuda for source in sources)
        if end > len(self._memory):
            self._take(end, pinned=cuda)
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


def aligned(n_bytes: int) -> int:
    """Return the bytes that a copy of so many takes up."""
    return n_bytes + -n_bytes % _ALIGN_BYTES
