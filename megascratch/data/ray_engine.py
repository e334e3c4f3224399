"""Ray as the engine of preprocessing: the parts of a corpus spread over the machines of a cluster.

Each worker is an actor that builds the tokenizer once. Input, output and parts lie on a file system that all machines
see, under the same paths; only descriptions of parts travel (and decompressed text, where few files are compressed).
Ray restarts an actor that dies and gives it its part again.
"""

import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megascratch.data.workers import MAX_ATTEMPTS, Apply, Item, Result
from megascratch.errors import MegascratchError, MissingDependency, Problem, UserError


def require_ray() -> Any:
    """Import Ray. Raises: MissingDependency: if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        problem = Problem("ray", "is needed for --engine ray", "pip install 'megascratch[ray]'")
        raise MissingDependency(problem, "the options of preprocess") from None


@contextmanager
def in_order_on_ray(function: Callable[[Item], Result], workers: int) -> Iterator[Apply[Item, Result]]:
    """Start actors on the cluster that this machine belongs to, or on this machine alone, and stop them at the end.

    Args:
        function: applied to each item; pickled once. It may be applied again to an item whose actor died.
        workers: actors; each takes a CPU of the cluster.

    Yields: a function from items to (item, result) pairs, lazily and in order. An error that `function` raises is
        raised again there; so is MegascratchError when an item has killed MAX_ATTEMPTS actors.
    """
    ray = require_ray()
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
    try:
        shared = ray.put(function)
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=MAX_ATTEMPTS - 1)(_Worker)
        pool = [actor.remote([shared]) for _ in range(workers)]
        yield lambda items: _apply(ray, pool, items)
    finally:
        if started_here:
            ray.shutdown()


class _Worker:
    """What an actor is. The function comes as a reference in a list, which Ray leaves to us to fetch."""

    def __init__(self, reference: list[Any]) -> None:
        self._function: Callable[[Any], Any] = require_ray().get(reference[0])

    def apply(self, item: Any) -> tuple[Any, UserError | None]:
        """Return the result, or the user's error as a value: Ray would wrap a raised one in its own."""
        try:
            return self._function(item), None
        except UserError as error:
            return None, error


def _apply(ray: Any, pool: list[Any], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Give items to idle actors; at most twice as many items as actors are under way."""
    under_way: deque[tuple[Item, Any]] = deque()
    busy: dict[Any, Any] = {}
    for item in items:
        if len(busy) == len(pool):
            ready, _ = ray.wait(list(busy))
            idle = busy.pop(ready[0])
        else:
            idle = pool[len(busy)]
        reference = idle.apply.remote(item)
        busy[reference] = idle
        under_way.append((item, reference))
        while len(under_way) >= 2 * len(pool):
            yield _result(ray, *under_way.popleft())
    while under_way:
        yield _result(ray, *under_way.popleft())


def _result(ray: Any, item: Item, reference: Any) -> tuple[Item, Any]:
    try:
        result, error = ray.get(reference)
    except ray.exceptions.RayActorError as gone:
        raise MegascratchError(
            f"{item}: {MAX_ATTEMPTS} workers died at it: {gone}; finished parts are kept: add --resume"
        ) from gone
    if error is not None:
        raise error
    return item, result
