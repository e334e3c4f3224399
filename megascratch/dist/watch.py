"""`Watch`: names the rank that the others wait for, and ends all of them when the work cannot go on.

A thread of each rank tells the store, through which the ranks met, where its rank is. The first rank whose collective
fails, or takes longer than the time-out, asks for everyone's word; whose does not come, or who is not waiting, is it:

    rank 0   waits in all_reduce dp, 5.0 s    asks, reads the others' words, says the line below, ends
    rank 1   is in forward 0F1                answers, ends
    rank 2   was killed                       does not answer
    rank 3   waits in recv pp                 answers, ends

    rank 2 on node7 (process 4242) does not answer: it was killed or stopped, or its node is gone; last seen in step 12

A rank that was stopped (SIGSTOP) is ended by those on its host, for its launcher would wait until it is let go on.
Where the store itself does not answer for as long as the time-out, as on a node whose link is down, a second thread
says so and ends the rank.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from megascratch.dist.clock import StepClock
from megascratch.dist.launch import environment
from megascratch.errors import EXIT_FAILED, MegascratchError

_LOOK_S = 0.1  # between looks at whether someone asks
_ANSWERS_S = 0.5  # to wait for words, of the second within which a rank is to be named
_TOLD_S = 2.0  # to wait for the line to be said
_PACKAGE = Path(__file__).parents[1]
# What a backend says when the rank at the other end is gone or late; all of them raise RuntimeError.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Word:
    """Where a rank is: `waits` for others, in `doing` at `site`, since `for_s` seconds."""

    host: str
    process: int
    step: int
    doing: str
    site: str
    waits: bool
    for_s: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing} at {self.site}"


class _Listener:
    """A store that counts for how many looks it has not answered.

    Looks and not seconds: a process that was stopped and let go on has missed nothing.
    """

    def __init__(self, store: Any) -> None:
        self._store, self.silent_looks = store, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            answer = method(*arguments)
            self.silent_looks = 0
            return answer

        return call


class Watch:
    """Watches one rank for as long as the body runs; without effect on one rank alone.

    Args:
        rank, world_size: of this process.
        clock: of this rank, whose regions say where it is.
        timeout_s: a collective that waits longer ends the run.
        store: that all ranks share; None without.
        speaks: whether this rank tells, for its node, that the store is gone.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        clock: StepClock,
        timeout_s: float,
        store: Any = None,
        speaks: bool = True,
    ) -> None:
        self.rank, self.world_size, self.clock, self.timeout_s = rank, world_size, clock, timeout_s
        self._store: Any = None if store is None else _Listener(store)
        self._speaks = speaks
        self._host, self._main = socket.gethostname(), threading.get_ident()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @classmethod
    def over_default_group(cls, clock: StepClock, timeout_s: float) -> "Watch":
        """Return this rank's watch over the store through which the default process group met."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, clock, timeout_s)
        store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
        # A connection of its own: the main thread's may be in use when the ranks are asked.
        store = store.clone() if hasattr(store, "clone") else store
        own = dist.PrefixStore("watch", store)  # type: ignore[attr-defined]
        rank, env = dist.get_rank(), environment()
        speaks = env is None or env.local_rank == 0 or rank == 1  # rank 0 may be what is gone
        return cls(rank, dist.get_world_size(), clock, timeout_s, own, speaks)

    def __enter__(self) -> "Watch":
        if self._store is not None:
            self._publish()
            self._thread.start()
            threading.Thread(target=self._look_after_store, name="watch store", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._store is not None and error is not None and not isinstance(error, MegascratchError):
            if isinstance(error, RuntimeError) and _LOST.search(str(error)):
                self._ask(f"rank {self.rank} lost its peers in step {self.clock.step}")
                self._thread.join()  # which ends the process
            else:
                with suppress(RuntimeError):  # this rank's own traceback says what happened; the others end
                    self._store.set("told", "1")
                    self._store.set("asked", f"{kind.__name__ if kind else 'error'} on rank {self.rank}")
        self._ends.set()
        if self._store is not None:
            self._thread.join()

    def _run(self) -> None:
        published = time.monotonic()
        while not self._ends.wait(_LOOK_S):
            try:
                if self._store.check(["asked"]):
                    self._answer()
                doing, waits, since = self.clock.now()
                if waits and time.monotonic() - since > self.timeout_s:
                    self._ask(f"rank {self.rank} waited in {doing} in step {self.clock.step}")
                if time.monotonic() - published > max(_LOOK_S, self.timeout_s / 20):
                    self._publish()
                    published = time.monotonic()
            except RuntimeError:  # of the store
                if self._ends.wait(_LOOK_S):  # the others are through, and the store with them
                    return
                self._end_without_store()

    def _look_after_store(self) -> None:
        """End the process when the store no longer answers: no error comes through a link that is down."""
        while not self._ends.wait(_LOOK_S):
            self._store.silent_looks += 1
            if self._store.silent_looks * _LOOK_S > self.timeout_s:
                self._end_without_store()

    def _end_without_store(self) -> NoReturn:
        if self._speaks:
            gone = "the store of the ranks' meeting does not answer: rank 0's node is gone, or the link to it"
            self._say(f"{gone}; rank {self.rank} on {self._host} (process {os.getpid()}) was in {self._word()}")
        self._end()

    def _ask(self, why: str) -> None:
        """Ask every rank where it is. The one that asks first is to say what came of it."""
        with suppress(RuntimeError):
            if self._store.compare_set("asker", "", str(self.rank)).decode() == str(self.rank):
                self._store.set("asked", why)

    def _answer(self) -> NoReturn:
        """Say where this rank is, see that someone says what happened, and end the process."""
        with suppress(RuntimeError):
            self._publish("answer")
            if self._store.check(["asker"]) and self._store.get("asker").decode() == str(self.rank):
                self._say(f"{self._verdict()} ({self._store.get('asked').decode()})")
                self._store.set("told", "1")
            self._wait_for("told", _TOLD_S)
            for rank in self._silent():
                self._kill(rank)
        self._end()

    def _verdict(self) -> str:
        """Return who did not answer, or else who was not waiting."""
        deadline = time.monotonic() + _ANSWERS_S
        while self._silent() and time.monotonic() < deadline:
            time.sleep(0.02)
        if silent := self._silent():
            gone = "does not answer: it was killed or stopped, or its node is gone"
            return "; ".join(f"{self._name(r)} {gone}; last seen in {self._seen(r)}" for r in silent[:4])
        words = {rank: self._word_of("answer", rank) for rank in range(self.world_size)}
        busy = {rank: word for rank, word in words.items() if not word.waits}
        if busy:
            longest = sorted(busy, key=lambda rank: -busy[rank].for_s)[:4]
            return "; ".join(f"{self._name(r)} hangs for {busy[r].for_s:.1f} s in {busy[r]}" for r in longest)
        both = "; ".join(f"rank {rank}: {word}" for rank, word in list(words.items())[:4])
        return f"all ranks wait for each other: {both}; set train.debug_collectives = true to see who is astray"

    def _silent(self) -> list[int]:
        return [rank for rank in range(self.world_size) if not self._store.check([f"answer/{rank}"])]

    def _name(self, rank: int) -> str:
        word = self._word_of("seen", rank)
        return f"rank {rank} on {word.host} (process {word.process})"

    def _seen(self, rank: int) -> Word:
        return self._word_of("seen", rank)

    def _word_of(self, kind: str, rank: int) -> Word:
        return Word(**json.loads(self._store.get(f"{kind}/{rank}")))

    def _word(self) -> Word:
        doing, waits, since = self.clock.now()
        site = _site(self._main)
        return Word(self._host, os.getpid(), self.clock.step, doing, site, waits, time.monotonic() - since)

    def _publish(self, kind: str = "seen") -> None:
        self._store.set(f"{kind}/{self.rank}", json.dumps(asdict(self._word())))

    def _wait_for(self, key: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _kill(self, rank: int) -> None:
        word = self._word_of("seen", rank)
        if word.host == self._host and word.process != os.getpid():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(word.process, signal.SIGKILL)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _end(self) -> NoReturn:
        """End the process, whatever its main thread is in."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)


def _site(thread: int) -> str:
    """Return the line of the package that a thread is in; what only carries a call out for others does not count."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE) and file.parent.name != "dist":
            return f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a place outside of megascratch"
