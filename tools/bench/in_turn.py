"""Timing of functions beside each other, for the benchmarks of single operators."""

import time
from collections.abc import Callable


def best_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run the functions in turn, `repeats` times after a first, and return each one's best time of this thread.

    Each runs twice in its turn, and the second time counts: the first would find in the caches what another function
    left there, which reads the same inputs.
    """
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            function()
            start = time.thread_time()
            function()
            if repeat:
                best[name] = min(best[name], time.thread_time() - start)
    return best
