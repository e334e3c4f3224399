"""A tensor of which each rank of an axis owns a run, and has the whole where something uses it.

By hand, two ranks, 6 elements:

    run      rank 0: 0 1 2      rank 1: 3 4 5        what a rank changes
    whole    0 1 2 3 4 5 on both

A whole that lasts is brought up to date by `publish`, once the runs have changed; its own run may be a part of it. One
that does not is there from `fetch` to `release`, and costs no memory else.
"""

from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Axis


class Divided:
    """One of them; whole as it is made.

    Args:
        whole: [numel].
        run: this rank's, [numel / size]; in host memory too, if the whole does not last.
        axis: over which it is divided; of size 1, both are the same.
        waiting: who else waits while this rank does, for the clock.
        lasts: whether the whole stays between uses.
    """

    def __init__(self, whole: Tensor, run: Tensor, axis: Axis, waiting: Axis, lasts: bool) -> None:
        self.whole, self.run, self.axis, self.waiting, self.lasts = whole, run, axis, waiting, lasts
        self._gathering: comm.Work | None = None
        self._is_whole = True

    def publish(self) -> None:
        """The runs have changed: start to give every rank what the others have, or leave it to the next `fetch`."""
        if self.lasts and self.axis.size > 1:
            self._gathering = comm.start_all_gather(self.whole, self.run.clone(), self.axis)

    def fetch(self) -> None:
        """Start to bring here what is not."""
        if not self._is_whole:
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
            own = self.run.to(self.whole.device, non_blocking=True)
            self._gathering, self._is_whole = comm.start_all_gather(self.whole, own, self.axis), True

    def need(self) -> None:
        """Have all of it here."""
        self.fetch()
        if self._gathering is not None:
            with self.waiting.waiting("gather"):
                self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """Give back the memory of a whole that does not last."""
        if not self.lasts and self._is_whole:
            self.need()
            self.whole.untyped_storage().resize_(0)
            self._is_whole = False
