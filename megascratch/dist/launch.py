"""From one command to many ranks: read the launcher's environment, or start the ranks here.

The only reader of environment variables.

Under torchrun, and under Slurm's `srun` without it, the environment names this process's rank. Outside both, a layout
of more than one rank is started on this machine through torch's own elastic launcher.
"""

import ctypes
import inspect
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megascratch.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError, Problem


@dataclass(frozen=True)
class Environment:
    """Who this process is among all that were launched."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def device(self) -> torch.device:
        """The accelerator that belongs to the local rank, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def environment(variables: Mapping[str, str] = os.environ) -> Environment | None:
    """Read who we are from torchrun's or Slurm's variables, or return None outside of both.

    A Slurm job that runs more than one task needs MASTER_ADDR and MASTER_PORT for the tasks to meet.

    Raises: ConfigError: if the variables are there but make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in variables:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        # An interactive `salloc` shell sets SLURM_PROCID too; only a step of `srun` is one of many.
        if "SLURM_STEP_ID" not in variables or "SLURM_PROCID" not in variables:
            return None
    try:
        rank, world_size = int(variables[names[0]]), int(variables[names[1]])
        local_rank = int(variables.get(names[2], "0"))
        local_world_size = int(variables.get(names[3], "1"))
        if not 0 <= rank < world_size:
            raise ValueError
    except (KeyError, ValueError):
        shown = ", ".join(f"{name}={variables.get(name)}" for name in names)
        raise ConfigError(
            Problem(shown, "must name this process's rank in the world", "start through torchrun or srun"),
            "the environment",
        ) from None
    if names[0] == "SLURM_PROCID" and world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys():
        raise ConfigError(
            Problem("MASTER_ADDR, MASTER_PORT", "must be exported for srun without torchrun", "see examples/slurm/"),
            "the environment",
        )
    return Environment(rank, world_size, local_rank, local_world_size)


@contextmanager
def process_group(env: Environment, timeout_s: float = 600.0) -> Iterator[None]:
    """Join the world for as long as the body runs: gloo for CPU tensors, NCCL beside it where there are GPUs.

    Args:
        env: who this process is.
        timeout_s: a collective that waits longer fails, and with it the run.

    Raises: ConfigError: if the port that the ranks are to meet at is taken.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo",
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        problem = Problem(
            f"MASTER_PORT = {os.environ['MASTER_PORT']}", "is in use by another program", "set it to a free port"
        )
        raise ConfigError(problem, "the environment") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_cores(local_world_size: int) -> None:
    """Give each of the ranks on this machine its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ or local_world_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, for the next step asks for the same ones.

    glibc gives them back to the system and asks again, which zeroes every page anew: on a CPU 6% of a float32 step of
    16M parameters, 2% in bfloat16. Other C libraries have no such call, and GPUs an allocator of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks from the heap, too
        mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never gets smaller


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def start_ranks(
    n_ranks: int, target: Callable[..., int], *args: Any, max_restarts: int = 0, deadline_s: float = 30.0
) -> int:
    """Run `target(*args)` in `n_ranks` processes of this machine, and return the exit code of them all.

    Args:
        n_ranks: world size.
        target: a module-level function; it returns its process's exit code, and finds its rank by `environment`.
        args: picklable arguments.
        max_restarts: how often all ranks are started again after one has failed; a user's mistake stays one.
        deadline_s: that ranks have to end in when they are asked to, before they are killed.

    Returns: 0, or the code that a rank ended with: 2 and 75 win over any other.
    """
    for restart in range(max_restarts + 1):
        code = _start_once(n_ranks, target, args, deadline_s)
        if code != EXIT_FAILED or restart == max_restarts:
            break
        print(f"a rank has failed: restart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
    return code


def _start_once(n_ranks: int, target: Callable[..., int], args: tuple[Any, ...], deadline_s: float) -> int:
    # Ranks on one machine share its cores: without this, every process would start a thread a core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n_ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id=f"megascratch-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        **_patience(deadline_s),
    )
    try:
        elastic_launch(config, _rank_main)(target, args)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_USER_ERROR, EXIT_STOPPED):
            if code in codes:
                return code
        return EXIT_FAILED
    except SignalException as stop:
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None  # Ctrl-C reached every rank too: nothing was saved
        return EXIT_STOPPED
    return EXIT_DONE


def _patience(deadline_s: float) -> dict[str, Any]:
    """Return what tells torch's agent how long to wait for ranks that it has asked to end: 30 s before torch 2.13."""
    known = "shutdown_timeout" in inspect.signature(LaunchConfig).parameters
    return {"shutdown_timeout": math.ceil(deadline_s)} if known else {}


def _rank_main(target: Callable[..., int], args: tuple[Any, ...]) -> None:
    code = target(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        sys.exit(code)


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 asked the run to stop; the trainer looks after every step.

    Args:
        deadline_s: that the run then has to save and end in. When it is over the process ends, saved or not: who asked
            will not wait longer.
    """

    def __init__(self, deadline_s: float) -> None:
        self.received, self.deadline_s = False, deadline_s
        self._timer: threading.Timer | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def done(self) -> None:
        """The run has ended in time."""
        if self._timer is not None:
            self._timer.cancel()

    def _receive(self, *_: Any) -> None:
        if not self.received:
            self._timer = threading.Timer(self.deadline_s, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        self.received = True

    def _give_up(self) -> None:
        text = f"asked to stop, and not saved within checkpoint.deadline_s = {self.deadline_s:g} s"
        print(text, file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
