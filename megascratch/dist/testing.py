"""Run a test on several ranks: `@distributed(world=4)`.

    @distributed(world=4)
    def test_sum():                       # a module-level function; this body runs once on every rank
        mesh = Mesh.create(MeshSpec(tp=4), torch.device("cpu"))
        assert comm.sum_over(torch.ones(()), mesh.tp) == 4

Ranks are processes forked from a server that has torch loaded already, so that starting four takes a fraction of a
second and inherits no thread of the test runner. They meet through a file, not a port. The first failing rank's
traceback becomes the test's failure; a rank that hangs ends all of them at the time-out.
"""

import functools
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
    context = multiprocessing.get_context("forkserver")
    # What this process has imported of ours, the ranks will want too: imported once, before they fork.
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.split(".")[0] == "megascratch"))
    source = inspect.getsourcefile(function)
    assert source is not None
    where = (source, function.__module__, function.__qualname__)
    with tempfile.TemporaryDirectory(prefix="megascratch-test-") as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            target_args = (where, rank, world, folder, theirs, args, kwargs, timeout_s)
            process = context.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], timeout_s: float) -> list[Any]:
    """Wait for every rank's result; the first failure ends the wait."""
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"rank(s) {sorted(waiting.values())} did not finish within {timeout_s:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                error, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=1)
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    where: tuple[str, str, str],
    rank: int,
    world: int,
    folder: str,
    pipe: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout_s: float,
) -> None:
    def report(error: str | None, value: Any = None) -> None:
        # Plain pickle copies tensors; the pipe's own pickler would share memory that ends with this process.
        pipe.send_bytes(pickle.dumps((error, value)))

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
        function = _undecorated(*where)
        value = function(*args, **kwargs)
        dist.barrier()
        report(None, value)
        dist.destroy_process_group()
    except UserError as error:
        report(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    except BaseException:
        report(traceback.format_exc())


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
