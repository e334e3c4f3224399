"""Running a stage of training on all its ranks, and telling a user's mistake once, not once a rank."""

import signal
import sys
import time
from collections.abc import Callable

from megascratch.config import Config
from megascratch.dist.launch import Environment, environment, start_ranks
from megascratch.errors import UserError

Stage = Callable[[Config, Environment | None], int]

_RANK_0_FIRST_S = 2.0


def run_ranks(stage: Stage, config: Config) -> int:
    """Run a stage on every rank of a layout.

    Under torchrun or Slurm this process is one of the ranks. Outside, a layout of one rank runs in this process, and a
    larger one in processes started here.

    Args:
        stage: a module-level function that runs one rank and returns its exit code.
        config: resolved.

    Returns: the exit code.
    """
    parallel = config.parallel
    n_ranks = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)
    if environment() is None and n_ranks > 1:
        return start_ranks(n_ranks, run_rank, stage, config)
    return run_rank(stage, config)


def run_rank(stage: Stage, config: Config) -> int:
    """Run one rank of a stage; print a user's mistake, unless another rank has it in common and prints it.

    Returns: the exit code.
    """
    env = environment()
    try:
        return stage(config, env)
    except UserError as error:
        if env is not None and env.rank != 0:
            # Most mistakes meet every rank alike. Rank 0 tells them, and the launcher then ends this process; a mistake
            # that only this rank has met, such as a damaged piece of a checkpoint, it tells itself.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_RANK_0_FIRST_S)
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
