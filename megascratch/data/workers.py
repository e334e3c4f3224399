"""Workers that apply one function, with results in the order of the items, whatever happens to a worker.

    items      a b c d ...      two workers, at most four items under way
    worker 0   a     d          c fails with its worker: another is started, and c given out again
    worker 1     b c†  c
    yielded    a b c d          in the order of the items, so a slow item only delays what is behind it

The local workers are processes. They are forked, so starting one costs nothing, and each is told about one item at a
time over its pipe. The parent has no thread per worker and never blocks on one: it waits for all pipes at once.
"""

import ctypes
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from megascratch.errors import MegascratchError

Item = TypeVar("Item")
Result = TypeVar("Result")
Apply = Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]

MAX_ATTEMPTS = 3  # of one item: what kills three workers will kill a fourth
_JOIN_TIMEOUT_S = 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
_LARGE_BYTES = 32 << 20  # from here on memory goes back to the kernel at once; glibc takes no larger value


@contextmanager
def in_order(function: Callable[[Item], Result], workers: int) -> Iterator[Apply]:
    """Start workers, and stop them at the end.

    Args:
        function: applied to each item; forking carries it over, so it needs no pickling. It may be applied again to an
            item whose worker died.
        workers: processes; 1 applies the function in this process.

    Yields: a function from items to (item, result) pairs, lazily and in order. An error that `function` raises is
        raised again there; so is MegascratchError when an item has killed MAX_ATTEMPTS workers.
    """
    if workers == 1:
        yield lambda items: ((item, function(item)) for item in items)
        return
    pool = _Pool(function, workers)
    try:
        yield pool.apply
    finally:
        pool.close()


@dataclass
class _Task(Generic[Item, Result]):
    """One item: how often it was given out, and what came of it."""

    item: Item
    attempts: int = 0
    answer: tuple[Result | None, Exception | None] | None = None


class _Pool(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._function = function
        self._context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, _Task[Item, Result]] = {}
        self._idle: list[Connection] = []
        self._workers = workers
        for _ in range(workers):
            self._start()

    def apply(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) in the order of the items; at most twice as many as workers are under way."""
        under_way: list[_Task[Item, Result]] = []
        for item in items:
            under_way.append(_Task(item))
            while not self._idle:
                self._receive()
            self._send(under_way[-1])
            while under_way and (under_way[0].answer is not None or len(under_way) >= 2 * self._workers):
                yield self._finish(under_way.pop(0))
        for task in under_way:
            yield self._finish(task)

    def close(self) -> None:
        """Stop the workers."""
        for pipe in self._processes:
            pipe.close()  # an idle worker reads the end of its pipe, and returns
        for pipe, process in self._processes.items():
            if pipe in self._busy:
                process.terminate()
            process.join(_JOIN_TIMEOUT_S)
            process.kill()

    def _finish(self, task: _Task[Item, Result]) -> tuple[Item, Result]:
        while task.answer is None:
            self._receive()
        result, error = task.answer
        if error is not None:
            raise error
        return task.item, result  # type: ignore[return-value]

    def _send(self, task: _Task[Item, Result]) -> None:
        task.attempts += 1
        pipe = self._idle.pop()
        self._busy[pipe] = task
        try:
            pipe.send(task.item)
        except OSError:
            self._replace(pipe)

    def _receive(self) -> None:
        for ready in wait(list(self._busy)):
            assert isinstance(ready, Connection)
            try:
                answer = ready.recv()
            except (EOFError, OSError):
                self._replace(ready)
                continue
            self._busy.pop(ready).answer = answer
            self._idle.append(ready)

    def _replace(self, pipe: Connection) -> None:
        """Start another worker for one that died, and give it the same item."""
        task = self._busy.pop(pipe)
        process = self._processes.pop(pipe)
        pipe.close()
        process.join(_JOIN_TIMEOUT_S)
        if task.attempts >= MAX_ATTEMPTS:
            raise MegascratchError(
                f"{task.item}: {MAX_ATTEMPTS} worker processes died at it, the last with exit code {process.exitcode}; "
                "if the machine ran out of memory, use fewer workers; finished parts are kept: add --resume"
            )
        self._start()
        self._send(task)

    def _start(self) -> None:
        # A replacement is forked beside the thread that draws progress. What a worker does takes no lock that this
        # thread could hold at that moment.
        ours, theirs = self._context.Pipe()
        others = [*self._processes, ours]
        process = self._context.Process(target=_serve, args=(self._function, theirs, others), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        self._idle.append(ours)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: every block takes the same megabytes, and the kernel would clear them each time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def _serve(function: Callable[[Item], Result], pipe: Connection, others: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _keep_freed_memory()
    for other in others:
        other.close()  # else the workers would hold each other's pipes open when the parent dies
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        answer: tuple[Result | None, Exception | None]
        try:
            answer = (function(item), None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (None, error)
        pipe.send(answer)
