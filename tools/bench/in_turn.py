"""Timing of functions, or of contestants in processes of their own, beside each other: in turn, round after round."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable


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


def best_rates(
    script: str, methods: Iterable[str], contestants: Iterable[str], rounds: int, *options: str
) -> dict[tuple[str, str], float]:
    """Run `script --run CONTESTANT METHOD` on one thread, all in turn; return the best rate that each one printed last.

    Everything else on the machine only slows a contestant down, so the best round counts. One that fails ends it all.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for method in methods:
            for contestant in contestants:
                command = [sys.executable, script, *options, "--run", contestant, method]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                rate = float(done.stdout.splitlines()[-1])
                best[method, contestant] = max(rate, best.get((method, contestant), 0.0))
    return best
