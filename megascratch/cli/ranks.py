"""Running a verb's work on all its ranks, and telling what went wrong once, not once a rank."""

import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from megascratch.dist.launch import Environment, environment, start_ranks
from megascratch.errors import EXIT_FAILED, MegascratchError

Request = TypeVar("Request")
Work = Callable[[Request, Environment | None], int]

_RANK_0_FIRST_S = 10.0


def run_ranks(
    work: Work[Request], request: Request, n_ranks: int, max_restarts: int = 0, deadline_s: float = 30.0
) -> int:
    """Run a verb's work on every rank.

    Under torchrun or Slurm this process is one of the ranks. Outside, one rank runs in this process, and several run in
    processes started here.

    Args:
        work: a module-level function that runs one rank and returns its exit code.
        request: what it is to do, a recipe for instance; picklable.
        n_ranks: how many ranks the layout has.
        max_restarts, deadline_s: of ranks that are started here, as for `start_ranks`.

    Returns: the exit code.
    """
    if environment() is not None or (n_ranks == 1 and max_restarts == 0):
        return run_rank(work, request)
    # Each rank tells its own errors; the launcher's would only add that a process has ended.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return start_ranks(n_ranks, run_rank, work, request, max_restarts=max_restarts, deadline_s=deadline_s)


def run_rank(work: Work[Request], request: Request) -> int:
    """Run one rank, and print the error that ends it.

    Returns: the exit code.
    """
    env = environment()
    try:
        return work(request, env)
    except MegascratchError as error:
        if env is not None and env.rank != 0:
            # Most mistakes meet every rank alike. Rank 0 tells them, and the launcher then ends this process; one that
            # this rank alone has met, such as a damaged piece of a checkpoint, it tells itself.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_RANK_0_FIRST_S)
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        if env is None:
            raise
        print(f"rank {env.rank} failed", traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
        return EXIT_FAILED
