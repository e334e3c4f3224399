"""Worker processes that apply one function, with results in the order of the items.

One thread of the parent talks to each worker, one item at a time over a pipe, so neither side can block the other.
At most twice as many items as workers are under way: memory stays bounded however long the input is.
"""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from megascratch.errors import MegascratchError

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_TIMEOUT_S = 5.0


@contextmanager
def in_order(
    function: Callable[[Item], Result], workers: int
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Start workers, and stop them at the end. Enter it before starting threads: the workers are forked.

    Args:
        function: applied to each item; forking carries it over, so it needs no pickling.
        workers: processes; 1 applies the function in this process.

    Yields: a function from items to (item, result) pairs, lazily and in order. An error that `function` raises is
        raised again there; so is MegascratchError when a worker dies.
    """
    if workers == 1:
        yield lambda items: ((item, function(item)) for item in items)
        return
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=_serve, args=(function, own, pipes), daemon=True) for own in range(workers)]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    idle: SimpleQueue[Connection] = SimpleQueue()
    for ours, _ in pipes:
        idle.put(ours)
    threads = ThreadPoolExecutor(workers)

    def submit_in_order(items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        under_way: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            under_way.append((item, threads.submit(_ask, idle, item)))
            if len(under_way) >= 2 * workers:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()

    try:
        yield submit_in_order
    finally:
        threads.shutdown(cancel_futures=True)
        for ours, _ in pipes:
            ours.close()  # the worker reads the end of its pipe, and returns
        for process in processes:
            process.join(_JOIN_TIMEOUT_S)
            process.kill()


def _ask(idle: "SimpleQueue[Connection]", item: Item) -> Result:  # type: ignore[type-var]
    worker = idle.get()
    try:
        worker.send(item)
        result, error = worker.recv()
    except (EOFError, OSError) as gone:
        raise MegascratchError("a worker process died; if the machine ran out of memory, use fewer workers") from gone
    finally:
        idle.put(worker)
    if error is not None:
        raise error
    return result


def _serve(function: Callable[[Item], Result], own: int, pipes: list[tuple[Connection, Connection]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    for number, (ours, theirs) in enumerate(pipes):
        ours.close()  # else the workers would hold each other's pipes open when the parent dies
        if number != own:
            theirs.close()
    pipe = pipes[own][1]
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
