"""Run a test on several ranks: `@distributed(world=4)`.

    @distributed(world=4)
    def test_sum():                       # a module-level function; this body runs once on every rank
        mesh = Mesh.create(MeshSpec(tp=4), torch.device("cpu"))
        assert comm.sum_over(torch.ones(()), mesh.tp) == 4

Ranks are processes forked from a server that has torch loaded already, so that starting four takes a fraction of a
second and inherits no thread of the test runner. They meet through a file, not a port. The first failing rank's
traceback becomes the test's failure; a rank that hangs ends all of them at the time-out. Many short jobs share a
`RankPool`, whose processes start once.
"""

import functools
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascratch.errors import UserError


def distributed(world: int, timeout_s: float = 120.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a module-level test function so that its body runs on `world` gloo ranks.

    Arguments (fixtures and parameters) are sent to the ranks, so they must be picklable.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def on_all_ranks(*args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(test).bind(*args, **kwargs)
            run_ranks(world, test, *bound.args, timeout_s=timeout_s, **bound.kwargs)

        return on_all_ranks

    return decorate


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Run `function(*args, **kwargs)` on `world` gloo ranks and return every rank's result, in rank order.

    Raises: AssertionError: with the failing rank's traceback, or naming the ranks that did not finish in time.
    """
    with RankPool() as pool:
        return pool.run(world, function, *args, timeout_s=timeout_s, **kwargs)


class RankDied(AssertionError):
    """A rank's process ended before its job did, as tests that kill ranks expect."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection


class RankPool:
    """Processes that run one job after another, each as the ranks of a world of their own.

    A job gets a new process group, so nothing of one can reach the next but what it leaves in module globals. After a
    failure all processes are ended, and the next job starts new ones.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("forkserver")

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Run a job, as `run_ranks` does. Raises: RankDied: if a rank's process ends before its job does."""
        source = inspect.getsourcefile(function)
        assert source is not None
        where = (source, function.__module__, function.__qualname__)
        while len(self._workers) < world:
            self._workers.append(self._start())
        workers = self._workers[:world]
        with tempfile.TemporaryDirectory(prefix="megascratch-test-") as folder:
            try:
                for rank, worker in enumerate(workers):
                    worker.pipe.send_bytes(pickle.dumps((where, rank, world, folder, args, kwargs, timeout_s)))
                return _collect(workers, timeout_s)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        # What this process has imported of ours, the ranks will want too: imported once, before they fork.
        self._context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("megascratch")))
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker_main, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _collect(workers: list[_Worker], timeout_s: float) -> list[Any]:
    """Wait for every rank's result; the first failure ends the wait."""
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(workers):
        waiting = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"rank(s) {sorted(waiting.values())} did not finish within {timeout_s:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                error, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                process = workers[rank].process
                process.join(timeout=1)
                raise RankDied(f"rank {rank} died with exit code {process.exitcode}") from None
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = value
    return [results[rank] for rank in range(len(workers))]


def _worker_main(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the test runner is gone
            return
        gc.freeze()  # what is here before a job is not looked through after it: that took as long as a small job
        # Plain pickle copies tensors; the pipe's own pickler would share memory that ends with this process.
        pipe.send_bytes(pickle.dumps(_run_job(*job)))


def _run_job(
    where: tuple[str, str, str],
    rank: int,
    world: int,
    folder: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout_s: float,
) -> tuple[str | None, Any]:
    """Return the failure, or None, and the result of one rank."""
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
        value = _undecorated(*where)(*args, **kwargs)
        gc.collect()  # what the job leaves in cycles holds process groups, each with threads and sockets of its own
        dist.barrier()
        dist.destroy_process_group()
        return None, value
    except UserError as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None
    except BaseException:
        return traceback.format_exc(), None


def _undecorated(source: str, module_name: str, name: str) -> Callable[..., Any]:
    """Return the body of a test. Test modules lie in no package, so they are loaded by file, under their own name."""
    if module_name not in sys.modules:
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError:
            spec = importlib.util.spec_from_file_location(module_name, source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    body: Any = functools.reduce(getattr, name.split("."), sys.modules[module_name])
    return inspect.unwrap(body)
