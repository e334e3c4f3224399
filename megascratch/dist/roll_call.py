"""`RollCall`: in debug mode, the ranks of a collective tell each other where they are before they begin it.

Ranks that are at different places add up what does not belong together, or wait for each other until a time-out. Here
each writes what it is about to do into the store through which the processes met, and reads what the others wrote. By
hand, rank 1 forgot a sum over tp:

    rank 0   tp, number 41   all_reduce of [16, 1, 32] at nn/linear.py:88 row_linear       both read both lines,
    rank 1   tp, number 41   all_gather of [16, 1, 32] at nn/linear.py:61 column_linear    and raise CollectiveError

Where a line does not come, its rank may still compute, or wait over another axis. So a rank that has waited a while
says for whom, and follows the others' word: a chain that returns to itself will never end, nor one that ends at a rank
that has stopped.

    rank 0 waits over tp for rank 1, which waits over dp for rank 3, which waits over tp for rank 2, … for rank 0

A transfer between two ranks is a meeting like any other, of which only what is sent is compared: its ends stand in
different lines.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascratch.errors import CollectiveError

if TYPE_CHECKING:
    from megascratch.dist.mesh import Axis

_PATIENCE_S = 1.0  # between looks at what the others wait for; a chain has to be there twice
_FRAMES = 3  # a linear layer's line alone does not tell whose it is
_PACKAGE = Path(__file__).parents[1]
_SILENT = (f"{Path(__file__).parent}/", f"{Path(torch.__file__).parent}/")  # what calls collectives for others


@dataclass(frozen=True)
class Place:
    """What a rank is about to do.

    Attributes:
        step: of training.
        operation: collective, and over which axis.
        passes: shape and dtype, where all ranks must agree on them.
        site: the lines that called, innermost first.
    """

    step: int
    operation: str
    passes: str
    site: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.operation}{self.passes} at {self.site}"


@dataclass(frozen=True)
class Meeting:
    """One collective, or one transfer: its name in the store, and the global ranks that take part."""

    key: str
    ranks: tuple[int, ...]
    is_transfer: bool = False

    def line(self, rank: int) -> str:
        """Return the store's key of what a rank wrote."""
        return f"{self.key}/{rank}"


@dataclass(frozen=True)
class _Wait:
    """What a waiting rank says of itself, with its error once it waits no more and never comes."""

    place: Place
    meeting: Meeting
    error: str = ""


class RollCall:
    """Compares where ranks are. One a rank; its axes call it.

    Args:
        store: that all ranks share, a `torch.distributed.Store`.
        rank: global.
        timeout_s: how long to wait for a rank of which nothing is known.

    Attributes:
        step: of training, for messages; ranks in different steps are at different places.
    """

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        self.store, self.rank, self.timeout_s = store, rank, timeout_s
        self.step = 0
        self._held: Counter[str] = Counter()  # meetings of each group or transfer so far
        self._last: dict[str, Place] = {}  # of each group, where all ranks were alike
        self._site: str | None = None  # given by the forward whose backward runs

    def meet(self, axis: "Axis", operation: str, x: Tensor | None) -> None:
        """Wait until all ranks of an axis are here, and see that they are about to do the same.

        Args:
            axis: over which the collective goes.
            operation: its name.
            x: what it takes; None where ranks may differ in it.

        Raises: CollectiveError: on every rank of the axis, naming all of them; or where a rank can never come.
        """
        self.announce(axis, operation, x)()

    def announce(self, axis: "Axis", operation: str, x: Tensor | None) -> Callable[[], None]:
        """Say that a collective begins; the function returned waits for the others as `meet` does."""
        group = f"{axis.name} of ranks {axis.ranks}"
        return self._open(_group_key(axis), axis.ranks, self._place(f"{operation} over {group}", x))

    def announce_transfer(self, axis: "Axis", peer: int, sends: bool, tag: int, x: Tensor) -> Callable[[], None]:
        """Say that a transfer to or from the rank at coordinate `peer` begins; the function returned waits for it."""
        other = axis.ranks[peer]
        ranks = (self.rank, other) if sends else (other, self.rank)
        place = self._place(f"{'send to' if sends else 'receive from'} rank {other} under tag {tag}", x)
        return self._open(f"{_group_key(axis)}/{ranks[0]}-{ranks[1]}/{tag}", ranks, place, is_transfer=True)

    def backward_of_here(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function for the backward, whose collectives are named by the line that calls this."""
        site = f"backward of {self._here()}"

        def named(grad: Tensor) -> Tensor:
            before, self._site = self._site, site
            try:
                return function(grad)
            finally:
                self._site = before

        return named

    def _place(self, operation: str, x: Tensor | None) -> Place:
        passes = "" if x is None else f" of {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        return Place(self.step, operation, passes, self._here())

    def _here(self) -> str:
        return self._site or " ← ".join(_frames())

    def _open(self, key: str, ranks: tuple[int, ...], place: Place, is_transfer: bool = False) -> Callable[[], None]:
        self._held[key] += 1
        meeting = Meeting(f"{key}/{self._held[key]}", ranks, is_transfer)
        self.store.set(meeting.line(self.rank), json.dumps(asdict(place)))
        return lambda: self._close(meeting, place)

    def _close(self, meeting: Meeting, place: Place) -> None:
        self._wait(meeting, place)
        lines = [json.loads(line) for line in self.store.multi_get([meeting.line(rank) for rank in meeting.ranks])]
        places = {rank: Place(**line) for rank, line in zip(meeting.ranks, lines)}
        if self.store.add(f"{meeting.key}/left", 1) == len(meeting.ranks):
            for name in (*meeting.ranks, "left"):
                self.store.delete_key(f"{meeting.key}/{name}")
        compared = {p.passes for p in places.values()} if meeting.is_transfer else set(places.values())
        if len(compared) > 1:
            raise self._stopped("ranks meet at different places", meeting, places, self._last.get(_group_of(meeting)))
        self._last[_group_of(meeting)] = place

    def _wait(self, meeting: Meeting, place: Place) -> None:
        """Wait until every rank has written its line."""
        expected = [meeting.line(rank) for rank in meeting.ranks]
        deadline, chain = time.monotonic() + self.timeout_s, None
        waited = False
        while True:
            try:
                self.store.wait(expected, timedelta(seconds=_PATIENCE_S))
                break
            except dist.DistNetworkError:  # the process that holds the store is gone
                raise
            except RuntimeError:  # time-out: a DistStoreError, but of a FileStore
                waited = True
            self._say(_Wait(place, meeting))
            before, chain = chain, self._chain()
            for wait in (chain or {}).values():
                if wait.error:
                    raise CollectiveError(f"{wait.error}\n  for which waits rank {self.rank}  {place}")
            if chain is not None and chain == before:
                # What this rank said of itself stays true, so the others find the same chain.
                raise _error("ranks wait for each other for ever", {r: wait.place for r, wait in chain.items()})
            if time.monotonic() > deadline:
                what = f"rank(s) {self._missing(meeting)} did not come within {self.timeout_s:g} s"
                raise self._stopped(what, meeting, {self.rank: place})
        if waited:  # before the lines can be deleted, or others would take this rank for one that waits for them
            self.store.set(f"at/{self.rank}", "")

    def _chain(self) -> dict[int, _Wait] | None:
        """Follow who waits for whom, from here; None if that ends at a rank that may yet come."""
        chain: dict[int, _Wait] = {}
        rank = self.rank
        while rank not in chain:
            said = self.store.get(f"at/{rank}") if self.store.check([f"at/{rank}"]) else ""
            if not said:
                return None
            chain[rank] = wait = _wait_of(json.loads(said))
            if wait.error:
                return chain
            missing = self._missing(wait.meeting)
            if not missing:
                return None
            rank = missing[0]
        return chain

    def _missing(self, meeting: Meeting) -> list[int]:
        return [rank for rank in meeting.ranks if not self.store.check([meeting.line(rank)])]

    def _stopped(
        self, what: str, meeting: Meeting, places: dict[int, Place], before: Place | None = None
    ) -> CollectiveError:
        """Return an error, and tell it to the ranks that will wait for this one."""
        error = _error(what, places, before)
        self._say(_Wait(places[self.rank], meeting, str(error)))
        return error

    def _say(self, wait: _Wait) -> None:
        self.store.set(f"at/{self.rank}", json.dumps(asdict(wait)))


def join_roll_call(timeout_s: float) -> RollCall:
    """Return this rank's roll call over the store through which the default process group met."""
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    return RollCall(dist.PrefixStore("roll_call", store), dist.get_rank(), timeout_s)  # type: ignore[attr-defined]


def _error(what: str, places: dict[int, Place], before: Place | None = None) -> CollectiveError:
    width = max(len(str(rank)) for rank in places)
    lines = [f"  rank {rank:>{width}}  {place}" for rank, place in sorted(places.items())]
    last = [] if before is None else [f"  before that, all of them  {before}"]
    return CollectiveError("\n".join([what, *lines, *last]))


def _group_key(axis: "Axis") -> str:
    assert axis.group is not None
    return f"{axis.name}/{axis.group.group_name}"  # torch numbers groups alike on all their ranks


def _group_of(meeting: Meeting) -> str:
    return meeting.key.rpartition("/")[0]


def _wait_of(value: dict[str, Any]) -> _Wait:
    meeting = value["meeting"]
    meeting = Meeting(meeting["key"], tuple(meeting["ranks"]), meeting["is_transfer"])
    return _Wait(Place(**value["place"]), meeting, value["error"])


def _frames() -> Iterator[str]:
    """Yield the innermost lines that are neither torch's nor of this package, as nn/linear.py:88 row_linear."""
    frame, n = sys._getframe(1), 0
    while frame is not None and n < _FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_SILENT):
            yield f"{_shown(code.co_filename)}:{frame.f_lineno} {code.co_name}"
            n += 1
        frame = frame.f_back  # type: ignore[assignment]


@cache
def _shown(file: str) -> str:
    """Return a file's name in the package, or its last part: where it is installed differs between machines."""
    path = Path(file)
    return str(path.relative_to(_PACKAGE)) if path.is_relative_to(_PACKAGE) else path.name
